// Stage 4 of 5, mail: MAIL, RCPT and DATA are three steps of one message, which is printed.
// Usage: 4-mail [PORT]; without one it is 8025, and 0 takes any port that is free. Try it: nc -C 127.0.0.1 8025
#include "asyncore.hpp"

struct Session : asynchat::async_chat {
    std::string line;                    // what has come of it, or of the text
    std::vector<std::string> envelope;   // the sender, then the recipients
    bool in_text = false;                // from DATA to the end of the text

    Session(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map) : async_chat(std::move(sock), map) {
        ac_out_queue_limit = 65536;   // bytes; a client that does not fetch them is not read either
        set_terminator("\r\n");
        reply("220 stage 4");
    }
    void reply(const std::string& text) { push(text + "\r\n"); }
    void collect_incoming_data(std::string_view data) override {
        line += data;
        if (line.size() > (in_text ? 1 << 20 : 512)) close();
    }
    void found_terminator() override {
        const std::string text = std::exchange(line, {});
        if (std::exchange(in_text, false)) return found_text(text);
        std::string verb = text.substr(0, text.find(' ')), arg = verb == text ? "" : text.substr(verb.size() + 1);
        for (char& c : verb) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
        if (verb == "HELO") return reply(arg.empty() ? "501 Syntax: HELO hostname" : "250 localhost");
        if (verb == "NOOP") return reply("250 OK");
        if (verb == (envelope.empty() ? "RCPT" : "MAIL")) return reply("503 Error: first MAIL, and then RCPT");
        if (verb == "MAIL" || verb == "RCPT") return envelope.push_back(arg), reply("250 OK");
        if (verb == "DATA") return envelope.size() < 2 ? reply("503 Error: need RCPT command") : smtp_DATA();
        if (verb != "QUIT") return reply("500 Error: command not recognized");
        reply("221 Bye");
        close_when_done();   // when all has been sent; close() would lose what has not
    }
    // The text ends with a dot on a line of its own. The CR LF of DATA's own line goes back into the input, as if the
    // text began with it: so a dot on the first line follows a CR LF too, and "." at once is the end of an empty text.
    void smtp_DATA() {
        in_text = true;
        set_terminator("\r\n.\r\n");
        unread("\r\n");
        reply("354 End data with <CR><LF>.<CR><LF>");
    }
    // To a line that begins with a dot the client adds another one (RFC 5321, 4.5.2): it is taken away here.
    void found_text(std::string text) {
        for (std::size_t at = 0; (at = text.find("\r\n.", at)) != text.npos; at += 2) text.erase(at + 2, 1);
        for (const auto& address : std::exchange(envelope, {})) log_info(asyncore::repr(address));
        log_info(asyncore::repr(text.erase(0, 2)));   // without the CR LF that was put back
        set_terminator("\r\n");
        reply("250 OK");
    }
};

struct Server : asyncore::dispatcher {
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) override {
        _map->own(std::make_unique<Session>(std::move(sock), _map));   // it lives until it closes
    }
};

int main(int argc, char** argv) {
    Server server;
    server.create_socket();
    server.set_reuse_addr();   // the port is free at once when the program is started anew
    server.bind({"127.0.0.1", argc > 1 ? std::stoi(argv[1]) : 8025});
    server.listen(5);
    server.log_info("listening on " + server.socket->getsockname().str());
    asyncore::loop();   // until nothing is left in the map; the listener stays in it
}

// Question: what is missing, before strangers may connect? Think of EHLO and SIZE, of "MAIL nonsense", of a client
// that says nothing for a day, and of the program that wants the messages. How little can be left for you to write?
