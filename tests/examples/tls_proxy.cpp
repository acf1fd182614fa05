// A proxy with TLS on both sides: clients may say STARTTLS; the next server has to, or speaks TLS at once, and its
// certificate and name are checked. Without TLS, or with the wrong one, there is no mail for it: 451, and the reason
// here. Usage: tls_proxy CERT KEY PORT NEXT_HOST NEXT_PORT [starttls|smtps [AUTHORITIES]]
//
//     ./tls_server cert.pem key.pem 2025 2465 & ./tls_proxy cert.pem key.pem 1025 localhost 2465 smtps cert.pem
//     swaks --server localhost:1025 --to you@example.com --tls
//
// cert.pem: see tls_server.cpp. Whoever reaches the port can send mail anywhere: keep it on a loopback address.
#include <iostream>

#include "tls.hpp"

// Tells why there is no session: the client learns no more than 451.
struct Session : tls::session<smtpd::SMTP> {
    using session::session;
    bool told = false;
    void ehlo_or_helo_if_needed(handler then) override {
        session::ehlo_or_helo_if_needed([this, then](const smtpd::reply& answer) {
            if (answer.code != 250 && !told) std::cout << "next server: " << answer.line() << std::endl;
            then(answer);
        });
    }
    void handle_error() override {
        try {
            throw;
        } catch (const std::exception& error) {
            std::cout << "next server: " << error.what() << std::endl;
        }
        told = true;
        session::handle_error();
    }
};

struct Proxy : tls::server<smtpd::PureProxy, tls::channel<smtpd::ProxyChannel>> {
    tls::context authorities;
    tls::mode next = tls::mode::required;

    using server::server;
    std::unique_ptr<smtpd::SMTP> make_session(side) const override {
        return std::make_unique<Session>(authorities, _remoteaddr.host, next, settings.map, settings.upstream);
    }
};

int main(int argc, char** argv) {
    if (argc < 6) {
        std::cerr << "usage: tls_proxy CERT KEY PORT NEXT_HOST NEXT_PORT [starttls|smtps [AUTHORITIES]]\n";
        return 2;
    }
    try {
        Proxy proxy({"127.0.0.1", std::stoi(argv[3])}, {argv[4], std::stoi(argv[5])},
                    tls::server_context(argv[1], argv[2]), tls::mode::offered);
        proxy.authorities = tls::client_context(argc > 7 ? argv[7] : "");
        if (argc > 6 && argv[6] == std::string("smtps")) proxy.next = tls::mode::at_once;
        std::cout << "listening on " << proxy.socket->getsockname().str() << std::endl;
        asyncore::loop();
    } catch (const std::exception& error) {
        std::cerr << "tls_proxy: " << error.what() << '\n';
        return 1;
    }
}
