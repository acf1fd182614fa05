// AUTH PLAIN and LOGIN (RFC 4954) for a server of your own: a verb, and lines that are no commands. Have your server
// make an AuthChannel for each client (auth.cpp), or a tls::channel<AuthChannel> (tls_server.cpp).
#ifndef AUTH_HPP
#define AUTH_HPP

#include "smtpd.hpp"

struct AuthChannel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    static inline std::string known;                 // USER:PASSWORD; "" lets everybody in
    static inline bool only_encrypted = false;       // a password in the clear is not even asked for
    static constexpr std::size_t longest = 12288;    // bytes of a line of AUTH, its CR LF included (RFC 4954, 4)
    enum { credentials = 2, user_name, password };   // what the next line is: states beside COMMAND and DATA
    bool authenticated = false;
    std::string user;

    virtual bool secure() const { return false; }   // with TLS there is another answer
    bool may_ask() const { return secure() || !only_encrypted; }
    command find_command(std::string_view verb) override {
        return verb == "AUTH" ? static_cast<command>(&AuthChannel::smtp_AUTH) : SMTPChannel::find_command(verb);
    }
    std::vector<std::string> extensions() const override {
        return may_ask() ? std::vector<std::string>{"AUTH PLAIN LOGIN"} : std::vector<std::string>{};
    }
    // With TLS the conversation begins anew: who has authenticated before has to do it again.
    void set_socket(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map = nullptr) override {
        authenticated = false;
        SMTPChannel::set_socket(std::move(sock), map);
    }
    void smtp_EHLO(argument arg) override {
        SMTPChannel::smtp_EHLO(arg);
        command_size_limits["AUTH"] = longest - 2;
    }
    void smtp_MAIL(argument arg) override {
        authenticated ? SMTPChannel::smtp_MAIL(arg) : push("530 Authentication required");
    }
    void smtp_AUTH(argument arg) {
        if (!may_ask()) return push("538 Encryption required for requested authentication mechanism");
        if (!extended_smtp || authenticated || !mailfrom.empty()) return push("503 Bad sequence of commands");
        const std::string_view given = arg.value_or(""), mechanism = given.substr(0, given.find(' '));
        if (mechanism != "PLAIN" && mechanism != "LOGIN") return push("504 Unrecognized authentication type");
        smtp_state = mechanism == "PLAIN" ? credentials : user_name;
        if (given != mechanism) return take(given.substr(mechanism.size() + 1));
        push(smtp_state == credentials ? "334 " : "334 VXNlcm5hbWU6");   // "Username:"
    }
    // Of a line that is too long, the end is dropped: its length still tells that it was.
    void collect_incoming_data(std::string_view data) override {
        if (smtp_state >= credentials) data = data.substr(0, longest - std::min(longest, received_lines.size()));
        SMTPChannel::collect_incoming_data(data);
    }
    void found_terminator() override {
        if (smtp_state < credentials) return SMTPChannel::found_terminator();
        take(std::exchange(received_lines, {}));
    }
    void take(std::string_view line) {   // "=" is an empty answer, "*" a change of mind
        auto answer = decode(line == "=" ? "" : line);
        const auto step = std::exchange(smtp_state, COMMAND);
        if (line.size() > longest - 2) return push("500 Error: line too long");
        if (!answer) return push("501 Cancelled, or not base64");
        if (step == user_name) user = *answer, smtp_state = password;
        if (smtp_state == password) return push("334 UGFzc3dvcmQ6");   // "Password:"
        if (step == credentials) {                                     // whom to act for, NUL, user, NUL, password
            const std::size_t first = answer->find('\0'), second = answer->find('\0', first + 1);
            if (second == answer->npos) return push("501 Malformed credentials");
            user = answer->substr(first + 1, second - first - 1), answer->erase(0, second + 1);
        }
        authenticated = known.empty() || user + ":" + *answer == known;
        push(authenticated ? "235 Authentication successful" : "535 Authentication credentials invalid");
    }
    // The bytes that base64 stands for; nothing when it is malformed.
    static std::optional<std::string> decode(std::string_view text) {
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
};

#endif
