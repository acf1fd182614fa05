// A proxy: passes what it gets on 127.0.0.1:1025 to the server at 127.0.0.1:25, and its answers back.
// Usage: proxy [port [nexthost [nextport]]]
//
// Whoever reaches the port can send mail anywhere: keep it on a loopback address.
#include <cstdlib>
#include <iostream>

#include "smtpd.hpp"

int main(int argc, char** argv) {
    const int port = argc > 1 ? std::atoi(argv[1]) : 1025;
    const std::string nexthost = argc > 2 ? argv[2] : "127.0.0.1";
    const int nextport = argc > 3 ? std::atoi(argv[3]) : 25;
    try {
        smtpd::PureProxy server({"127.0.0.1", port}, {nexthost, nextport});
        std::cout << "from " << server.socket->getsockname().str() << " to " << server._remoteaddr.str() << std::endl;
        asyncore::loop();
    } catch (const std::exception& error) {
        std::cerr << "proxy: " << error.what() << '\n';
        return 1;
    }
}
