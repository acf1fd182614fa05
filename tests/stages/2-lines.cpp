// Stage 2 of 5, lines: each line that a client sends comes back, as soon as it is complete.
// Usage: 2-lines [PORT]; without one it is 8025, and 0 takes any port that is free. Try it: nc -C 127.0.0.1 8025
#include "asyncore.hpp"

// One client. An async_chat is a dispatcher whose reading and writing are done: it cuts the input at a terminator and
// keeps a queue of output. It asks two methods of us instead.
struct Session : asynchat::async_chat {
    std::string line;   // what has come of it

    Session(std::unique_ptr<asyncore::socket_type> sock, asyncore::map_type* map) : async_chat(std::move(sock), map) {
        ac_out_queue_limit = 65536;   // bytes; a client that does not fetch them is not read either
        set_terminator("\r\n");       // CR LF: so a line ends in SMTP, in FTP and in HTTP
    }
    // A piece of input without its terminator. A line that never ends must not fill our memory.
    void collect_incoming_data(std::string_view data) override {
        line += data;
        if (line.size() > 512) close();
    }
    // The terminator has come, whole or in two halves.
    void found_terminator() override { push(std::exchange(line, {}) + "\r\n"); }
};

// The listener is a dispatcher too. For a listener, an event means that a client has connected.
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

// Question: a line can be a command. How does the client learn what became of it, who speaks first, and how does the
// server hang up without losing its last words?
