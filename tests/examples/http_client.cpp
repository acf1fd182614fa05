// asyncore's HTTP client: prints what a server answers. Usage: http_client HOST [PATH [PORT]]
#include <cstdlib>
#include <iostream>
#include "asyncore.hpp"

struct HTTPClient : asyncore::dispatcher {
    std::string buffer;   // what is still to be sent
    int status = 0;

    HTTPClient(const std::string& host, const std::string& path, int port)
        : buffer("GET " + path + " HTTP/1.0\r\nHost: " + host + "\r\n\r\n") {
        const auto server = asyncore::getaddrinfo({host, port}).front();
        create_socket(server.family);
        connect(server);
    }
    void handle_connect() override {}
    void handle_close() override { close(); }
    void handle_read() override { std::cout << recv(8192); }
    bool writable() override { return !buffer.empty(); }
    void handle_write() override { buffer.erase(0, send(buffer)); }
    void handle_error() override {
        std::cerr << current_exception_text() << '\n';
        status = 1;
        close();
    }
};

int main(int argc, char** argv) try {
    if (argc < 2) throw std::invalid_argument("usage: http_client HOST [PATH [PORT]]");
    HTTPClient client(argv[1], argc > 2 ? argv[2] : "/", argc > 3 ? std::atoi(argv[3]) : 80);
    asyncore::loop();
    return client.status;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
