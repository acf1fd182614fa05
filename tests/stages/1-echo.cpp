// Stage 1 of 5, an echo: what a client sends, it gets back.
// Usage: 1-echo [PORT]; without one it is 8025, and 0 takes any port that is free. Try it: nc 127.0.0.1 8025
#include "asyncore.hpp"

// One client. A dispatcher is a socket with handlers. The loop waits for all sockets at once, and calls a handler of
// the object whose socket is ready. A handler never waits for anything: all the other clients would wait with it.
struct Session : asyncore::dispatcher {
    using dispatcher::dispatcher;
    std::string waiting;   // what has been received and not been sent yet

    // The loop asks these two before each wait. A client that sends and never reads must not fill our memory: it is
    // not read either. A socket is writable nearly always: if we always said yes, the loop would never rest.
    bool readable() override { return waiting.size() < 65536; }
    bool writable() override { return !waiting.empty(); }
    // At the end of input recv() calls handle_close() and returns "".
    void handle_read() override { waiting += recv(8192); }
    // send() takes as much as there is room for. The rest stays here until the socket is writable again.
    void handle_write() override { waiting.erase(0, send(waiting)); }
    void handle_close() override { close(); }
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

// Question: TCP carries bytes, not lines. "he" may come in one packet, "llo" and the end of the line in the next.
// Who puts the line together, and where does its first half wait?
