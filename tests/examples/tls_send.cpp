// Sends what it reads as a message, by a server with TLS whose certificate and name are checked. Says what the server
// said to it, or what was wrong. Usage: tls_send HOST PORT starttls|smtps FROM TO [AUTHORITIES]
//
//     ./tls_server cert.pem key.pem
//     echo "Subject: Hello" | ./tls_send localhost 1025 starttls me@example.com you@example.com cert.pem
//
// cert.pem: see tls_server.cpp.
#include <iostream>
#include <iterator>

#include "tls.hpp"

int main(int argc, char** argv) {
    if (argc < 6) {
        std::cerr << "usage: tls_send HOST PORT starttls|smtps FROM TO [AUTHORITIES]\n";
        return 2;
    }
    try {
        const std::string text(std::istreambuf_iterator<char>(std::cin), {}), from = argv[4], to = argv[5];
        const auto when = argv[3] == std::string("smtps") ? tls::mode::at_once : tls::mode::required;
        const auto authorities = tls::client_context(argc > 6 ? argv[6] : "");
        smtpd::reply result;
        asyncore::map_type map;
        tls::session<smtpd::SMTP> session(authorities, argv[1], when, &map);
        const auto done = [&](const smtpd::reply& answer) {
            result = answer;
            session.quit();
        };
        session.open({argv[1], std::stoi(argv[2])}, [&](const smtpd::reply& answer) {
            if (answer.code != 250) return done(answer);
            session.sendmail(from, {to}, text, {}, true, [&](const auto& last, const auto&) { done(last); });
        });
        asyncore::loop(30.0, false, &map);
        std::cout << result.line() << std::endl;
        return result.code == 250 ? 0 : 1;
    } catch (const std::exception& error) {
        std::cerr << "tls_send: " << error.what() << '\n';
        return 1;
    }
}
