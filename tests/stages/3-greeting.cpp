// Stage 3 of 5, a greeting: the server speaks first, and a line is a command: HELO, NOOP or QUIT.
// Usage: 3-greeting [PORT]; without one it is 8025, and 0 takes any port that is free. Try it: nc -C 127.0.0.1 8025
#include "asyncore.hpp"

// One client. Each command gets one reply: a number for programs (2xx is yes, 5xx is no), and a text for people.
struct Session : asynchat::async_chat {
    std::string line;   // what has come of it

    Session(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map) : async_chat(std::move(sock), map) {
        ac_out_queue_limit = 65536;   // bytes; a client that does not fetch them is not read either
        set_terminator("\r\n");
        reply("220 stage 3");
    }
    void reply(const std::string& text) { push(text + "\r\n"); }
    void collect_incoming_data(std::string_view data) override {
        line += data;
        if (line.size() > 512) close();
    }
    void found_terminator() override {
        const std::string text = std::exchange(line, {});
        std::string verb = text.substr(0, text.find(' ')), arg = verb == text ? "" : text.substr(verb.size() + 1);
        for (char& c : verb) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
        if (verb == "HELO") return reply(arg.empty() ? "501 Syntax: HELO hostname" : "250 localhost");
        if (verb == "NOOP") return reply("250 OK");
        if (verb != "QUIT") return reply("500 Error: command not recognized");
        reply("221 Bye");
        close_when_done();   // when all has been sent; close() would lose what has not
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

// Question: a message takes three commands: from whom, to whom, the text. What must a session remember between them?
// And a line of the text may look like a command, or like the end of the text: how are they told apart?
