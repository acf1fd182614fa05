// What tls_test.py attacks: a server with limits that a test does not have to wait for, and a client that is as
// patient. Usage: tls_test serve CERT KEY IDLE_MS IN_BUFFER | tls_test ask HOST PORT starttls|offered|smtps AUTHORITIES
// MS
#include "tls.hpp"

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
    tls::session<smtpd::LMTP> session(tls::client_context(args[3]), args[0], when, &map,
                                      smtpd::timeouts::all(std::chrono::milliseconds(std::stoi(args[4]))));
    session.local_hostname = "tester";
    session.open({args[0], std::stoi(args[1])}, [&](const smtpd::reply& answer) {
        std::cout << answer.code << ' ' << (session.encrypted() ? "encrypted " : "") << answer.text << std::endl;
        session.quit();
    });
    asyncore::loop(30.0, false, &map);
    return 0;
}

}   // namespace

int main(int, char** argv) { return argv[1] == std::string("serve") ? serve(argv + 2) : ask(argv + 2); }
