// AUTH PLAIN and LOGIN (RFC 4954), a verb of one's own. Usage: auth [PORT [USER:PASSWORD]]; without the latter
// everybody is let in. Passwords are sent in the clear: listen on a loopback address, or behind TLS.
#include <iostream>
#include "smtpd.hpp"

std::string known;   // USER:PASSWORD
// The bytes that base64 stands for; nothing when it is malformed.
std::optional<std::string> decode(std::string_view text) {
    const std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const std::size_t end = text.find_last_not_of('=') + 1;
    std::string bytes;
    if (text.size() % 4 != 0 || text.size() - end > 2) return std::nullopt;
    for (std::size_t i = 0, bits = 0; i < end; ++i) {
        const std::size_t digit = digits.find(text[i]);
        if (digit == digits.npos) return std::nullopt;
        bits = bits << 6 | digit;
        if (i % 4) bytes += static_cast<char>(bits >> (6 - i % 4 * 2) & 0xff);
    }
    return bytes;
}

struct AuthChannel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    enum { credentials = 2, user_name, password };   // what the next line is: states beside COMMAND and DATA
    bool authenticated = false;
    std::string user;
    command find_command(std::string_view verb) override {
        return verb == "AUTH" ? static_cast<command>(&AuthChannel::smtp_AUTH) : SMTPChannel::find_command(verb);
    }
    std::vector<std::string> extensions() const override { return {"AUTH PLAIN LOGIN"}; }
    void smtp_MAIL(argument arg) override {
        authenticated ? SMTPChannel::smtp_MAIL(arg) : push("530 Authentication required");
    }
    void smtp_AUTH(argument arg) {
        if (!extended_smtp || authenticated) return push("503 Bad sequence of commands");
        const std::string_view given = arg.value_or(""), mechanism = given.substr(0, given.find(' '));
        if (mechanism != "PLAIN" && mechanism != "LOGIN") return push("504 Unrecognized authentication type");
        smtp_state = mechanism == "PLAIN" ? credentials : user_name;
        if (given != mechanism) return take(given.substr(mechanism.size() + 1));
        push(smtp_state == credentials ? "334 " : "334 VXNlcm5hbWU6");   // "Username:"
    }
    void found_terminator() override {
        if (smtp_state < credentials) return SMTPChannel::found_terminator();
        take(std::exchange(received_lines, {}));
    }
    void take(std::string_view line) {   // "=" is an empty answer, "*" a change of mind
        auto answer = decode(line == "=" ? "" : line);
        const auto step = std::exchange(smtp_state, COMMAND);
        if (!answer) return push("501 Cancelled, or not base64");
        if (step == user_name) user = *answer, smtp_state = password;
        if (smtp_state == password) return push("334 UGFzc3dvcmQ6");   // "Password:"
        if (step == credentials) {   // whom to act for, NUL, user, NUL, password
            const std::size_t first = answer->find('\0'), second = answer->find('\0', first + 1);
            if (second == answer->npos) return push("501 Malformed credentials");
            user = answer->substr(first + 1, second - first - 1), answer->erase(0, second + 1);
        }
        authenticated = known.empty() || user + ":" + *answer == known;
        push(authenticated ? "235 Authentication successful" : "535 Authentication credentials invalid");
    }
};

struct AuthServer : smtpd::DebuggingServer {
    using DebuggingServer::DebuggingServer;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        return std::make_unique<AuthChannel>(*this, std::move(conn), from);
    }
};

int main(int argc, char** argv) {
    if (argc > 2) known = argv[2];
    AuthServer server({"127.0.0.1", argc > 1 ? std::stoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
