// A server with TLS: STARTTLS on one port, SMTPS on another, both in one loop. It prints the messages. With
// USER:PASSWORD it takes none without a login (auth.hpp), and asks for a password only where all is encrypted.
// Usage: tls_server CERT KEY [PORT [SMTPS_PORT [USER:PASSWORD]]]
//
//  openssl req -x509 -newkey rsa -nodes -subj /CN=me -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem
//  ./tls_server cert.pem key.pem
//  curl --ssl-reqd --cacert cert.pem smtp://localhost:1025 --mail-rcpt me -T README.md
//
// Compile with: c++ -std=c++17 -I. tests/examples/tls_server.cpp smtpd.cpp asyncore.cpp -lssl -lcrypto -o tls_server
#include <iostream>

#include "auth.hpp"
#include "tls.hpp"

struct SecureAuthChannel : tls::channel<AuthChannel> {
    using channel::channel;
    bool secure() const override { return encrypted(); }
};

template <typename Channel>
void serve(const tls::context& certificate, int port, int smtps_port, tls::mode when) {
    using Server = tls::server<smtpd::DebuggingServer, Channel>;
    Server starttls({"127.0.0.1", port}, {}, certificate, when);
    Server smtps({"127.0.0.1", smtps_port}, {}, certificate, tls::mode::at_once);
    std::cout << "listening on " << starttls.socket->getsockname().str() << ", and with TLS at once on "
              << smtps.socket->getsockname().str() << std::endl;
    asyncore::loop();
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: tls_server CERT KEY [PORT [SMTPS_PORT [USER:PASSWORD]]]\n";
        return 2;
    }
    const int port = argc > 3 ? std::stoi(argv[3]) : 1025, smtps_port = argc > 4 ? std::stoi(argv[4]) : 1465;
    try {
        const auto certificate = tls::server_context(argv[1], argv[2]);
        if (argc > 5) {
            AuthChannel::known = argv[5];
            AuthChannel::only_encrypted = true;
            serve<SecureAuthChannel>(certificate, port, smtps_port, tls::mode::required);
        } else {
            serve<tls::channel<smtpd::SMTPChannel>>(certificate, port, smtps_port, tls::mode::offered);
        }
    } catch (const std::exception& error) {
        std::cerr << "tls_server: " << error.what() << '\n';
        return 1;
    }
}
