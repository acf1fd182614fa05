#include "support.hpp"

#include <sys/socket.h>

#include <cerrno>

#include "test.hpp"

namespace support {

recorder::recorder(asyncore::map_type& map, smtpd::options with)
    : SMTPServer({"127.0.0.1", 0}, {}, [&] {
          with.map = &map;
          if (with.fqdn.empty()) with.fqdn = "mx.test";
          return with;
      }()) {}

std::optional<std::string> recorder::process_message(const asyncore::address& peer, const std::string& mailfrom,
                                                     const std::vector<std::string>& rcpttos, std::string&& data,
                                                     const smtpd::message_options& kwargs) {
    messages.push_back({peer, mailfrom, rcpttos, data, kwargs.mail_options, kwargs.rcpt_options});
    return status;
}

client::client(asyncore::map_type& map, asyncore::socket_type sock) : map_(&map), sock_(std::move(sock)) {
    sock_.setblocking(false);
}

client client::pair(smtpd::SMTPServer& server) {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) throw std::runtime_error("socketpair");
    client made(*server._map, asyncore::socket_type(fds[0]));
    asyncore::address none;
    none.family = AF_UNIX;
    server.handle_accepted(std::make_unique<asyncore::socket_type>(fds[1]), none);
    return made;
}

client client::tcp(asyncore::map_type& map, int port, const std::string& host) {
    const auto addr = asyncore::getaddrinfo({host, port}).front();
    client made(map, asyncore::socket_type(addr.family, SOCK_STREAM));
    const int err = made.sock_.connect_ex(addr);
    if (err != 0 && err != EINPROGRESS) throw std::runtime_error("connect");
    return made;
}

bool client::receive() {
    char buffer[65536];
    try {
        const std::size_t n = sock_.recv(buffer, sizeof buffer);
        if (n == 0) return !std::exchange(eof_, true);
        received_.append(buffer, n);
        return true;
    } catch (const std::system_error& error) {
        const int err = error.code().value();
        if (err == EAGAIN || err == EWOULDBLOCK || err == ENOTCONN) return false;
        return !std::exchange(eof_, true);
    }
}

void client::send(std::string_view bytes) {
    const auto end = asyncore::clock::now() + std::chrono::seconds(10);
    while (!bytes.empty()) {
        try {
            bytes.remove_prefix(sock_.send(bytes));
        } catch (const std::system_error& error) {
            if (asyncore::DISCONNECTED(error.code().value()) && error.code().value() != ENOTCONN) return;
            if (asyncore::clock::now() > end) throw;
            asyncore::poll(0.001, map_);
            receive();
        }
    }
}

std::string client::hear() {
    // Quiet: five passes in a row, the last with a little patience, in which nothing came.
    for (int quiet = 0; quiet < 5; ++quiet) {
        asyncore::poll(quiet == 4 ? 0.002 : 0.0, map_);
        while (!eof_ && receive()) quiet = -1;
    }
    return std::exchange(received_, {});
}

std::string client::say(std::string_view bytes) {
    send(bytes);
    return hear();
}

std::string client::wait_for(std::string_view text) {
    std::size_t at = 0;
    run_until(*map_, [&] {
        while (!eof_ && receive()) {
        }
        return (at = received_.find(text)) != received_.npos;
    });
    std::string result = received_.substr(0, at + text.size());
    received_.erase(0, result.size());
    return result;
}

void client::shutdown_write() { ::shutdown(sock_.fileno(), SHUT_WR); }

void run_until(asyncore::map_type& map, const std::function<bool()>& done, bool use_poll) {
    static std::chrono::seconds patience(30);   // less when something has gone wrong already
    const auto end = asyncore::clock::now() + patience;
    while (!done()) {
        if (asyncore::clock::now() > end) {
            const auto waited = std::exchange(patience, std::chrono::seconds(1));
            throw std::runtime_error("nothing happened for " + std::to_string(waited.count()) + " s");
        }
        use_poll ? asyncore::poll2(0.01, &map) : asyncore::poll(0.01, &map);
    }
}

}  // namespace support
