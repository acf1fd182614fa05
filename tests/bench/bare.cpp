// bare.cpp: the limits that the bench measures against.
//
// Programs that exchange the same bytes in the same number of turns as an SMTP server, and do nothing
// else: no parsing, no addresses, no state beyond "commands" or "data". What they need is what the kernel
// needs; a real server can only come close.
//
//   bare [--poll] [--store] [--forward host:port] [--buffer bytes] [port]
//
//   (default)   a select() loop; --poll: a poll() loop
//   --store     also keeps the data of a message and turns CRLF into LF, then drops it
//   --forward   no replies of its own: copies bytes to and from another server (the limit of a relay)
//   --buffer    bytes read at once, default 65536
//   port        0 or absent: any free one. `port N` is printed once the program listens.
//
// A command line is answered by its first letter: D 354, E four lines, Q 221 and close, else 250. The end of
// the data is looked for only at the end of what one read brought, which is where every client puts it.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace {

constexpr std::string_view greeting = "220 localhost bare TCP program version 0\r\n";
constexpr std::string_view reply_ehlo = "250-localhost\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250 HELP\r\n";
constexpr std::string_view reply_ok = "250 OK\r\n";
constexpr std::string_view reply_data = "354 End data with <CR><LF>.<CR><LF>\r\n";
constexpr std::string_view reply_quit = "221 Bye\r\n";
constexpr std::string_view end_of_data = "\r\n.\r\n";

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

// ---- Waiting: one interface, select() or poll() ------------------------------------------------------

class waiter {
  public:
    explicit waiter(bool use_poll) : use_poll_(use_poll) {
        FD_ZERO(&read_);
        FD_ZERO(&write_);
    }

    // Sets what is waited for on a descriptor; neither: it is forgotten.
    void watch(int fd, bool readable, bool writable) {
        if (use_poll_) {
            watch_poll(fd, readable, writable);
            return;
        }
        if (fd >= FD_SETSIZE) {
            std::fputs("bare: too many descriptors for select(), use --poll\n", stderr);
            std::exit(1);
        }
        readable ? FD_SET(fd, &read_) : FD_CLR(fd, &read_);
        writable ? FD_SET(fd, &write_) : FD_CLR(fd, &write_);
        highest_ = std::max(highest_, fd);
    }

    // Waits, then calls handler(fd, readable, writable) for each descriptor that is ready.
    template <typename Handler>
    void pass(Handler handler) {
        if (use_poll_)
            pass_poll(handler);
        else
            pass_select(handler);
    }

  private:
    void watch_poll(int fd, bool readable, bool writable) {
        const auto i = static_cast<std::size_t>(fd);
        if (i >= slot_.size()) slot_.resize(i + 1024, npos);
        const bool wanted = readable || writable;
        if (wanted && slot_[i] == npos) {
            slot_[i] = polled_.size();
            polled_.push_back({fd, 0, 0});
        }
        if (wanted) {
            polled_[slot_[i]].events = static_cast<short>((readable ? POLLIN : 0) | (writable ? POLLOUT : 0));
        } else if (slot_[i] != npos) {
            const std::size_t hole = slot_[i];
            polled_[hole] = polled_.back();
            slot_[static_cast<std::size_t>(polled_[hole].fd)] = hole;
            polled_.pop_back();
            slot_[i] = npos;
        }
    }

    template <typename Handler>
    void pass_poll(Handler handler) {
        const int ready = ::poll(polled_.data(), polled_.size(), -1);
        if (ready < 0 && errno != EINTR) fail("poll");
        // The handler may change polled_, so first note who is ready.
        due_.clear();
        for (std::size_t i = 0; i < polled_.size() && due_.size() < static_cast<std::size_t>(std::max(ready, 0)); ++i)
            if (polled_[i].revents != 0) due_.push_back(polled_[i]);
        for (const pollfd& p : due_)
            handler(p.fd, (p.revents & (POLLIN | POLLHUP | POLLERR)) != 0, (p.revents & POLLOUT) != 0);
    }

    template <typename Handler>
    void pass_select(Handler handler) {
        fd_set r = read_;
        fd_set w = write_;
        int ready = ::select(highest_ + 1, &r, &w, nullptr, nullptr);
        if (ready < 0 && errno != EINTR) fail("select");
        for (int fd = 0; fd <= highest_ && ready > 0; ++fd) {
            const bool readable = FD_ISSET(fd, &r);
            const bool writable = FD_ISSET(fd, &w);
            if (readable || writable) {
                ready -= (readable ? 1 : 0) + (writable ? 1 : 0);
                handler(fd, readable, writable);
            }
        }
    }

    static constexpr std::size_t npos = static_cast<std::size_t>(-1);
    bool use_poll_;
    fd_set read_{};
    fd_set write_{};
    int highest_ = 0;
    std::vector<pollfd> polled_;
    std::vector<pollfd> due_;
    std::vector<std::size_t> slot_;   // by descriptor: its place in polled_
};

// ---- A message being stored --------------------------------------------------------------------------

// Grows by doubling; is read into directly; CRLF becomes LF in place, so each byte moves once.
class store {
  public:
    store() = default;
    store(const store&) = delete;
    store& operator=(const store&) = delete;
    ~store() { drop(); }

    void drop() {
        std::free(bytes_);
        bytes_ = nullptr;
        size_ = 0;
        room_ = 0;
    }

    // A place where at least `count` bytes can be put.
    char* space(std::size_t count) {
        if (room_ - size_ < count) {
            room_ = std::max(size_ + count, room_ * 2);
            void* grown = std::realloc(bytes_, room_);
            if (grown == nullptr) fail("realloc");
            bytes_ = static_cast<char*>(grown);
        }
        return bytes_ + size_;
    }

    std::size_t free_room() const { return room_ - size_; }

    // Takes `count` bytes that stand at space(). A CR at the very end is looked at next time.
    void take(std::size_t count) {
        char* out = bytes_ + size_;
        const char* in = out;
        const char* const last = in + count;
        if (size_ > 0 && out[-1] == '\r' && count > 0 && *in == '\n') --out;
        while (in < last) {
            const auto left = static_cast<std::size_t>(last - in);
            const auto* cr = static_cast<const char*>(std::memchr(in, '\r', left));
            const std::size_t n = cr == nullptr ? left : static_cast<std::size_t>(cr - in);
            if (out != in) std::memmove(out, in, n);
            out += n;
            in += n;
            if (in == last) break;
            if (in + 1 == last || in[1] != '\n') *out++ = '\r';
            ++in;
        }
        size_ = static_cast<std::size_t>(out - bytes_);
    }

  private:
    char* bytes_ = nullptr;
    std::size_t size_ = 0;
    std::size_t room_ = 0;
};

// ---- The program -------------------------------------------------------------------------------------

struct connection {
    bool open = false;
    bool in_data = false;
    bool at_start = true;   // of a command line
    char first = 0;         // the first letter of the command line
    char tail[5] = {};      // the last bytes of the data so far
    std::size_t tail_size = 0;
    int peer = -1;         // --forward: the other side
    std::string pending;   // --forward: what the socket did not take yet
};

struct settings {
    bool use_poll = false;
    bool storing = false;
    bool forwarding = false;
    std::size_t buffer = 65536;
    sockaddr_in upstream{};
    int port = 0;
};

class program {
  public:
    explicit program(const settings& s) : settings_(s), wait_(s.use_poll), buffer_(s.buffer) { listen(); }

    [[noreturn]] void run() {
        for (;;) wait_.pass([this](int fd, bool readable, bool writable) { event(fd, readable, writable); });
    }

  private:
    void listen() {
        listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        const int on = 1;
        sockaddr_in where{};
        where.sin_family = AF_INET;
        where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        where.sin_port = htons(static_cast<std::uint16_t>(settings_.port));
        socklen_t size = sizeof where;
        if (listener_ < 0 || ::setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0 ||
            ::bind(listener_, reinterpret_cast<sockaddr*>(&where), size) < 0 || ::listen(listener_, SOMAXCONN) < 0 ||
            ::getsockname(listener_, reinterpret_cast<sockaddr*>(&where), &size) < 0)
            fail("listen");
        wait_.watch(listener_, true, false);
        std::printf("port %d\n", ntohs(where.sin_port));
        std::fflush(stdout);
    }

    void event(int fd, bool readable, bool writable) {
        if (fd == listener_) {
            accept_all();
            return;
        }
        if (writable && at(fd).open) flush(fd);
        if (!readable || !at(fd).open) return;
        if (settings_.forwarding)
            forward(fd);
        else if (settings_.storing && at(fd).in_data)
            read_into_store(fd);
        else
            read_turn(fd);
    }

    connection& at(int fd) {
        const auto i = static_cast<std::size_t>(fd);
        if (i >= connections_.size()) connections_.resize(i + 1024);
        return connections_[i];
    }

    store& stored(int fd) {
        const auto i = static_cast<std::size_t>(fd);
        while (i >= stores_.size()) stores_.push_back(nullptr);
        if (stores_[i] == nullptr) stores_[i] = new store;
        return *stores_[i];
    }

    void accept_all() {
        for (;;) {
            const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0) {
                if (errno == ECONNABORTED || errno == EINTR) continue;
                if (errno != EAGAIN) fail("accept");
                return;
            }
            at(fd) = connection{};
            at(fd).open = true;
            wait_.watch(fd, true, false);
            if (settings_.forwarding)
                open_upstream(fd);
            else
                say(fd, greeting);
        }
    }

    void close_one(int fd) {
        wait_.watch(fd, false, false);
        ::close(fd);
        at(fd).open = false;
        if (settings_.storing && static_cast<std::size_t>(fd) < stores_.size() &&
            stores_[static_cast<std::size_t>(fd)] != nullptr)
            stored(fd).drop();
    }

    // Replies are small and the client reads them: a socket that does not take one is given up.
    void say(int fd, std::string_view text) {
        if (::send(fd, text.data(), text.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(text.size())) close_one(fd);
    }

    // True when there is something to work on.
    bool received(int fd, ssize_t count) {
        if (count > 0) return true;
        if (count == 0 || (errno != EAGAIN && errno != EINTR)) close_one(fd);
        return false;
    }

    void read_turn(int fd) {
        const ssize_t count = ::recv(fd, buffer_.data(), buffer_.size(), 0);
        if (received(fd, count)) turn(fd, {buffer_.data(), static_cast<std::size_t>(count)});
    }

    void turn(int fd, std::string_view in) {
        connection& c = at(fd);
        replies_.clear();
        while (!in.empty() && !c.in_data && c.first != 'Q') {
            if (c.at_start) c.first = in.front();
            const std::size_t lf = in.find('\n');
            c.at_start = lf != std::string_view::npos;
            in.remove_prefix(c.at_start ? lf + 1 : in.size());
            if (c.at_start) command(c);
        }
        if (c.in_data && !in.empty()) data(fd, in);
        if (!replies_.empty()) say(fd, replies_);
        if (c.at_start && c.first == 'Q' && c.open) close_one(fd);
    }

    void command(connection& c) {
        switch (c.first) {
            case 'D':
                replies_ += reply_data;
                c.in_data = true;
                std::memcpy(c.tail, "\r\n", 2);
                c.tail_size = 2;
                break;
            case 'E':
                replies_ += reply_ehlo;
                break;
            case 'Q':
                replies_ += reply_quit;
                break;
            default:
                replies_ += reply_ok;
                break;
        }
    }

    void data(int fd, std::string_view in) {
        connection& c = at(fd);
        if (settings_.storing) {
            std::memcpy(stored(fd).space(in.size()), in.data(), in.size());
            stored(fd).take(in.size());
        }
        if (ends(c, in)) end_message(fd);
    }

    void end_message(int fd) {
        at(fd).in_data = false;
        replies_ += reply_ok;
        if (settings_.storing) stored(fd).drop();
    }

    // Keeps the last five bytes and tells whether they are CRLF . CRLF.
    static bool ends(connection& c, std::string_view in) {
        if (in.size() >= sizeof c.tail) {
            std::memcpy(c.tail, in.data() + in.size() - sizeof c.tail, sizeof c.tail);
            c.tail_size = sizeof c.tail;
        } else {
            const std::size_t keep = std::min(c.tail_size, sizeof c.tail - in.size());
            std::memmove(c.tail, c.tail + c.tail_size - keep, keep);
            std::memcpy(c.tail + keep, in.data(), in.size());
            c.tail_size = keep + in.size();
        }
        return std::string_view(c.tail, c.tail_size) == end_of_data;
    }

    void read_into_store(int fd) {
        store& s = stored(fd);
        char* const place = s.space(settings_.buffer);
        const ssize_t count = ::recv(fd, place, s.free_room(), 0);
        if (!received(fd, count)) return;
        const std::string_view in(place, static_cast<std::size_t>(count));
        const bool ended = ends(at(fd), in);
        s.take(in.size());
        if (ended) {
            replies_.clear();
            end_message(fd);
            say(fd, replies_);
        }
    }

    // ---- --forward ----

    void open_upstream(int fd) {
        const int up = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        const auto* where = reinterpret_cast<const sockaddr*>(&settings_.upstream);
        if (up < 0 || (::connect(up, where, sizeof settings_.upstream) < 0 && errno != EINPROGRESS)) fail("connect");
        at(up) = connection{};
        at(up).open = true;
        at(up).peer = fd;
        at(fd).peer = up;
        wait_.watch(up, true, false);
    }

    void forward(int fd) {
        const int to = at(fd).peer;
        const ssize_t count = ::recv(fd, buffer_.data(), buffer_.size(), 0);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (count <= 0) {
            close_one(fd);
            close_one(to);
            return;
        }
        const ssize_t sent = ::send(to, buffer_.data(), static_cast<std::size_t>(count), MSG_NOSIGNAL);
        if (sent < count) {   // wait until the other side takes the rest, and read nothing until then
            at(to).pending.append(buffer_.data() + std::max<ssize_t>(sent, 0), buffer_.data() + count);
            wait_.watch(to, true, true);
            wait_.watch(fd, false, false);
        }
    }

    void flush(int fd) {
        connection& c = at(fd);
        const ssize_t sent = ::send(fd, c.pending.data(), c.pending.size(), MSG_NOSIGNAL);
        if (sent > 0) c.pending.erase(0, static_cast<std::size_t>(sent));
        if (!c.pending.empty()) return;
        wait_.watch(fd, true, false);
        wait_.watch(c.peer, true, false);
    }

    settings settings_;
    waiter wait_;
    int listener_ = -1;
    std::vector<char> buffer_;
    std::string replies_;
    std::vector<connection> connections_;   // by descriptor
    std::vector<store*> stores_;            // by descriptor, kept for the life of the program
};

sockaddr_in parse_address(const std::string& text) {
    const std::size_t colon = text.rfind(':');
    sockaddr_in where{};
    where.sin_family = AF_INET;
    if (colon == std::string::npos || ::inet_pton(AF_INET, text.substr(0, colon).c_str(), &where.sin_addr) != 1) {
        std::fputs("bare: the address is IPv4:port\n", stderr);
        std::exit(2);
    }
    where.sin_port = htons(static_cast<std::uint16_t>(std::atoi(text.c_str() + colon + 1)));
    return where;
}

settings parse(int argc, char** argv) {
    settings s;
    for (int i = 1; i < argc; ++i) {
        const std::string_view arg = argv[i];
        if (arg == "--poll")
            s.use_poll = true;
        else if (arg == "--store")
            s.storing = true;
        else if (arg == "--forward" && i + 1 < argc) {
            s.forwarding = true;
            s.upstream = parse_address(argv[++i]);
        } else if (arg == "--buffer" && i + 1 < argc)
            s.buffer = std::strtoul(argv[++i], nullptr, 10);
        else
            s.port = std::atoi(argv[i]);
    }
    return s;
}

}   // namespace

int main(int argc, char** argv) {
    rlimit files{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
    program(parse(argc, argv)).run();
}
