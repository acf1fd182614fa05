// asyncore and asynchat alone, of asyncore.hpp and asyncore.cpp: an echo server and its client in one loop, in a
// program that has functions named poll and loop of its own.

#include <iostream>

#include "asyncore.hpp"

struct echo : asyncore::dispatcher {
    using dispatcher::dispatcher;
    void handle_read() override { send(recv(8192)); }
    bool writable() override { return false; }
};

struct server : asyncore::dispatcher {
    server() {
        create_socket();
        bind({"127.0.0.1", 0});
        listen(1);
    }
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address&) override {
        _map->own(std::make_unique<echo>(std::move(sock), _map));
    }
};

struct client : asynchat::async_chat {
    std::string heard;
    bool done = false;

    explicit client(const asyncore::address& server) {
        set_terminator("\n");
        create_socket();
        connect(server);
        push("hello, loop\n");
    }
    void collect_incoming_data(std::string_view data) override { heard += data; }
    void found_terminator() override { done = true; }
};

int passes = 0;

void poll() { ++passes; }

void loop(const client& it) {
    for (; !it.done && passes < 100; poll()) asyncore::poll(1.0);
}

int main() {
    server listener;
    client it(listener.socket->getsockname());
    loop(it);
    std::cout << "heard: " << it.heard << '\n';
    return it.heard == "hello, loop" ? 0 : 1;
}
