// What tls_test.py attacks: a server with limits that a test does not have to wait for, and a client that is as
// patient. Usage: tls_test serve CERT KEY IDLE_MS IN_BUFFER | tls_test ask HOST PORT starttls|offered|smtps AUTHORITIES
// MS
#include "tls.hpp"

#include <poll.h>

#include <iostream>

namespace {

std::size_t in_buffer = 65536;

struct Channel : tls::channel<smtpd::SMTPChannel> {
    template <typename... Arguments>
    explicit Channel(Arguments&&... arguments) : channel(std::forward<Arguments>(arguments)...) {
        ac_in_buffer_size = in_buffer;
    }
};

struct Server : tls::server<smtpd::SMTPServer, Channel> {
    using server::server;
    std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                               const std::vector<std::string>&, std::string&& data,
                                               const smtpd::message_options&) override {
        return "250 " + std::to_string(std::hash<std::string>()(data)) + " of " + std::to_string(data.size()) +
               " bytes";
    }
};

int serve(char** args) {
    smtpd::options with;
    with.idle_timeout = std::chrono::milliseconds(std::stoi(args[2]));
    in_buffer = static_cast<std::size_t>(std::stoi(args[3]));
    const auto certificate = tls::server_context(args[0], args[1]);
    Server starttls({"127.0.0.1", 0}, {}, certificate, tls::mode::offered, with);
    Server smtps({"127.0.0.1", 0}, {}, certificate, tls::mode::at_once, with);
    for (const int buffer : {SO_SNDBUF, SO_RCVBUF})   // for all that it accepts
        if (args[4]) smtps.socket->setsockopt(SOL_SOCKET, buffer, std::stoi(args[4]));
    std::cout << "listening on " << starttls.socket->getsockname().str() << ", and with TLS at once on "
              << smtps.socket->getsockname().str() << std::endl;
    asyncore::loop();
    return 0;
}

int ask(char** args) {
    const std::string how = args[2];
    const auto when = how == "smtps"      ? tls::mode::at_once
                      : how == "starttls" ? tls::mode::required
                                          : tls::mode::offered;
    asyncore::map_type map;
    tls::session<smtpd::LMTP> session(tls::client_context(args[3]), args[5], when, &map,
                                      smtpd::timeouts::all(std::chrono::milliseconds(std::stoi(args[4]))));
    session.local_hostname = "tester";
    session.open({args[0], std::stoi(args[1])}, [&](const smtpd::reply& answer) {
        std::cout << answer.code << ' ' << (session.encrypted() ? "encrypted " : "") << answer.text << std::endl;
        session.quit();
    });
    asyncore::loop(30.0, false, &map);
    return 0;
}

// Asks for new keys again and again, each of which wants an answer, and reads none: until the server takes no more.
int flood(char** args) {
    asyncore::socket_type plain(AF_INET, SOCK_STREAM);
    plain.setblocking(true);
    for (const int buffer : {SO_SNDBUF, SO_RCVBUF}) plain.setsockopt(SOL_SOCKET, buffer, 4096);
    const int failed = plain.connect_ex(asyncore::getaddrinfo({"127.0.0.1", std::stoi(args[0])}).at(0));
    const tls::context context(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free);
    SSL* const ssl = SSL_new(context.get());
    if (failed || !SSL_set_fd(ssl, plain.fileno()) || SSL_connect(ssl) != 1) return 1;
    plain.setblocking(false);
    for (int waited = 0; waited < 20;) {
        if (SSL_is_init_finished(ssl)) SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED);
        waited = SSL_do_handshake(ssl) == 1 ? 0 : waited + 1;
        if (waited) ::poll(nullptr, 0, 20);
    }
    std::cout << "blocked" << std::endl;
    for (;;) ::poll(nullptr, 0, -1);   // until it is killed
}

}   // namespace

int main(int, char** argv) {
    const std::string what = argv[1];
    return what == "serve" ? serve(argv + 2) : what == "ask" ? ask(argv + 2) : flood(argv + 2);
}
