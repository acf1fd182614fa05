// A server that wants a login (auth.hpp), and prints the messages. Usage: auth [PORT [USER:PASSWORD]]; without the
// latter everybody is let in. Passwords are sent in the clear: listen on a loopback address only, or see
// tls_server.cpp.
//
//     ./auth 1025 user:secret
//     swaks --server 127.0.0.1:1025 --to you@example.com --auth PLAIN --auth-user user --auth-password secret
#include "auth.hpp"

#include <iostream>

struct AuthServer : smtpd::DebuggingServer {
    using DebuggingServer::DebuggingServer;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        return std::make_unique<AuthChannel>(*this, std::move(conn), from);
    }
};

int main(int argc, char** argv) {
    if (argc > 2) AuthChannel::known = argv[2];
    AuthServer server({"127.0.0.1", argc > 1 ? std::stoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
