// asyncore's echo server: what a client sends, it gets back. Usage: echo_server [PORT]
#include <cstdlib>
#include <iostream>
#include "asyncore.hpp"

struct EchoHandler : asyncore::dispatcher_with_send {
    using dispatcher_with_send::dispatcher_with_send;
    void handle_read() override { send(recv(8192)); }
    bool readable() override { return out_buffer.size() < 65536; }   // a client that never reads is not read either
};

struct EchoServer : asyncore::dispatcher {
    explicit EchoServer(const asyncore::address& where) {
        create_socket();
        set_reuse_addr();
        bind(where);
        listen(5);
    }
    void handle_accepted(std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from) override {
        std::cout << "Incoming connection from " << from.repr() << std::endl;
        _map->own(std::make_unique<EchoHandler>(std::move(sock), _map));
    }
};

int main(int argc, char** argv) {
    EchoServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 8080});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
