// What the tests of the conversation share: a bare end of a connection, and a dialog that takes turns.

#ifndef DIALOG_HPP
#define DIALOG_HPP

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <initializer_list>
#include <iostream>
#include <sstream>

#include "support.hpp"
#include "test.hpp"

namespace support {

// What is written to a stream while this one lives.
class captured {
  public:
    explicit captured(std::ostream& stream) : stream_(stream), before_(stream.rdbuf(text_.rdbuf())) {}
    ~captured() { stream_.rdbuf(before_); }
    captured(const captured&) = delete;
    captured& operator=(const captured&) = delete;
    std::string text() const { return text_.str(); }

  private:
    std::ostringstream text_;
    std::ostream& stream_;
    std::streambuf* before_;
};

// ['a', 'b']
inline std::string list(const std::vector<std::string>& items) {
    std::string text;
    for (const auto& item : items) text += (text.empty() ? "" : ", ") + asyncore::repr(item);
    return "[" + text + "]";
}

// A message on one line: from -> recipients: data
inline std::string told(const message& it) {
    return it.mailfrom + " -> " + list(it.rcpttos) + ": " + asyncore::repr(it.data);
}

inline bool has_ipv6() {
    static const bool it_has = [] {
        try {
            asyncore::socket_type probe(AF_INET6, SOCK_STREAM);
            probe.bind(asyncore::getaddrinfo({"::1", 0}).front());
            return true;
        } catch (const std::system_error&) {
            return false;
        }
    }();
    return it_has;
}

// One end of a connection, without a loop: nothing is read unless it is asked for.
class wire {
  public:
    std::string received;   // by receive(), and not taken yet
    bool eof = false;

    explicit wire(int fd) : wire(asyncore::socket_type(fd)) {}
    explicit wire(asyncore::socket_type sock) : sock_(std::move(sock)) { sock_.setblocking(false); }

    // Both ends of a UNIX connection: a wire, and a socket to give away.
    static std::pair<wire, std::unique_ptr<asyncore::socket_type>> pair() {
        int fds[2];
        if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) throw std::runtime_error("socketpair");
        return {wire(fds[0]), std::make_unique<asyncore::socket_type>(fds[1])};
    }

    // A UNIX connection to the server, which has accepted it.
    static wire to(smtpd::SMTPServer& server) {
        auto [mine, theirs] = pair();
        server.handle_accepted(std::move(theirs), asyncore::address::unix_path(""));
        return std::move(mine);
    }

    // A TCP connection to a listener; it may not be accepted yet.
    static wire tcp(const std::string& host, int port) {
        const auto addr = asyncore::getaddrinfo({host, port}).front();
        const int fd = ::socket(addr.family, SOCK_STREAM, 0);
        wire made(fd);
        made.sock_.setblocking(true);
        if (made.sock_.connect_ex(addr) != 0) throw std::runtime_error("connect");
        made.sock_.setblocking(false);
        made.sock_.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);   // each piece is a packet
        return made;
    }

    int fd() const { return sock_.fileno(); }
    asyncore::socket_type& socket() { return sock_; }
    void close() { sock_.close(); }
    void shutdown_write() { ::shutdown(fd(), SHUT_WR); }

    // As much as the system takes now; nothing when the other side has closed.
    std::size_t send_some(std::string_view bytes) {
        try {
            return sock_.send(bytes);
        } catch (const std::system_error& error) {
            const int err = error.code().value();
            if (err == EAGAIN || err == EWOULDBLOCK || asyncore::DISCONNECTED(err)) return 0;
            throw;
        }
    }

    void send(std::string_view bytes) {
        if (send_some(bytes) != bytes.size()) throw std::runtime_error("the system does not take it all");
    }

    // At most `limit` bytes more; whether anything has come.
    bool receive(std::size_t limit = 65536) {
        std::string buffer(limit, '\0');
        try {
            const std::size_t n = sock_.recv(&buffer[0], limit);
            if (n == 0) return !std::exchange(eof, true);
            received.append(buffer, 0, n);
            return true;
        } catch (const std::system_error& error) {
            const int err = error.code().value();
            if (err == EAGAIN || err == EWOULDBLOCK) return false;
            return !std::exchange(eof, true);
        }
    }

    void receive_all() {
        while (!eof && receive()) {}
    }

    // Everything that has come since the last call.
    std::string take() {
        receive_all();
        return std::exchange(received, {});
    }

    bool input_waits(int timeout = 0) const {
        pollfd it{fd(), POLLIN, 0};
        return ::poll(&it, 1, timeout) > 0;
    }

  private:
    asyncore::socket_type sock_;
};

// Runs passes until the text has come; what has come up to and with it.
inline std::string wait_for(asyncore::map_type& map, wire& end, std::string_view text, bool use_poll = false) {
    std::size_t at = 0;
    const auto come = [&] {
        end.receive_all();
        return (at = end.received.find(text)) != std::string::npos || end.eof;
    };
    run_until(map, come, use_poll);
    if (at == std::string::npos) test::fail(__FILE__, __LINE__, "closed after " + test::show(end.received));
    std::string result = end.received.substr(0, at + text.size());
    end.received.erase(0, result.size());
    return result;
}

// Runs passes until the server closes; all that has come.
inline std::string wait_for_eof(asyncore::map_type& map, wire& end, bool use_poll = false) {
    const auto closed = [&] {
        end.receive_all();
        return end.eof;
    };
    run_until(map, closed, use_poll);
    return end.take();
}

// A server like CPython's DummyServer, with the host name '' that its recorded replies have.
template <typename Base>
class nameless : public Base {
  public:
    smtpd::SMTPChannel* channel = nullptr;   // the last one made
    asyncore::address peer;                  // that the channels take for theirs, if it is one

    using Base::Base;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        auto made = Base::channel_class(std::move(conn), from);
        made->fqdn.clear();
        if (!peer.none()) made->peer = peer;
        channel = made.get();
        return made;
    }
};

// Turns: an item arrives at the server as one packet, and what it says to that is compared.
class dialog {
  public:
    dialog(asyncore::map_type& map, wire end) : map_(map), wire_(std::move(end)) {}

    // What comes must be `expected`, and no less.
    void hear(std::string_view expected, std::string_view after = "nothing") {
        const auto end = asyncore::clock::now() + std::chrono::seconds(30);
        wire_.receive_all();
        while (wire_.received.size() < expected.size() && !wire_.eof && asyncore::clock::now() < end) {
            asyncore::poll(0.0, &map_);
            wire_.input_waits(1);
            wire_.receive_all();
        }
        const std::string said = std::exchange(wire_.received, {});
        if (said != expected)
            test::fail(__FILE__, __LINE__,
                       "after " + test::show(std::string(after)) + "\n    is  " + test::show(said) + "\n    not " +
                           test::show(std::string(expected)));
    }

    // Sends the item as it is; the server reads it in one piece, before anything else is sent.
    void send(std::string_view item) {
        wire_.send(item);
        asyncore::poll(5.0, &map_);
    }

    // A line, and the lines that answer it, all without their last CR LF. No answer: "".
    void line(const std::string& item, std::string answer) {
        send(item + "\r\n");
        if (!answer.empty()) answer += "\r\n";
        hear(answer, item);
    }

    struct turn {
        std::string item, answer;
    };
    void lines(std::initializer_list<turn> turns) {
        for (const auto& it : turns) line(it.item, it.answer);
    }

    // The client closes its side: the server closes too, and says nothing more.
    void end() {
        wire_.shutdown_write();
        const std::string rest = wait_for_eof(map_, wire_);
        if (!rest.empty()) test::fail(__FILE__, __LINE__, "at the end came " + test::show(rest));
    }

    wire& end_of_it() { return wire_; }

  private:
    asyncore::map_type& map_;
    wire wire_;
};

// Keeps the messages; the answer is what a function says, if there is one.
class hooked : public recorder {
  public:
    std::function<std::optional<std::string>(const smtpd::message_options& kwargs)> hook;

    using recorder::recorder;
    std::optional<std::string> process_message(const asyncore::address& from, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        auto answer = recorder::process_message(from, mailfrom, rcpttos, std::move(data), kwargs);
        return hook ? hook(kwargs) : answer;
    }
};

// A server without a name, and a client on a UNIX connection that has heard the banner.
struct session {
    asyncore::map_type map;
    nameless<hooked> server;
    dialog client;

    explicit session(const smtpd::options& with = {}) : server(map, with), client(map, wire::to(server)) {
        client.hear(banner(""));
    }
    smtpd::SMTPChannel& channel() { return *server.channel; }
    wire& end() { return client.end_of_it(); }
    void line(const std::string& item, const std::string& answer) { client.line(item, answer); }
    void lines(std::initializer_list<dialog::turn> turns) { client.lines(turns); }
    void helo_to_data() {
        line("HELO a", "250 ");
        mail_to_data();
    }
    void mail_to_data() {
        lines({{"MAIL FROM:<a@b>", "250 OK"},
               {"RCPT TO:<c@d>", "250 OK"},
               {"DATA", "354 End data with <CR><LF>.<CR><LF>"}});
    }
    // The client sends; passes are made as long as something comes; what has come.
    std::string say(std::string_view bytes) {
        end().send(bytes);
        return hear();
    }
    std::string hear() {
        for (int quiet = 0; quiet < 3; ++quiet) {
            const std::size_t before = end().received.size();
            asyncore::poll(0.0, &map);
            end().receive_all();
            if (end().received.size() != before) quiet = -1;
        }
        return end().take();
    }
};

}   // namespace support

#endif
