// asyncore where CPython's own tests do not look: the loop, errors, connections that fail, buffered output.

#include <sys/time.h>

#include <csignal>

#include "dialog.hpp"
#include "test.hpp"

using asyncore::dispatcher;
using asyncore::map_type;
using asyncore::socket_type;
using support::captured;
using support::wire;

namespace {

void pass(map_type& map, bool use_poll, std::optional<double> timeout = 0.0) {
    use_poll ? asyncore::poll2(timeout, &map) : asyncore::poll(timeout, &map);
}

// Says what happens to it.
struct witness : dispatcher {
    std::string said;
    using dispatcher::dispatcher;
    void handle_read() override { said += "read "; }
    void handle_write() override { said += "write "; }
    void handle_connect() override { said += "connect "; }
    void handle_expt() override { said += "expt "; }
    void handle_close() override {
        said += "close ";
        close();
    }
    void handle_error() override {
        said += "error ";
        close();
    }
};

// A port where nobody listens.
asyncore::address closed_port() {
    socket_type sock(AF_INET, SOCK_STREAM);
    sock.bind({support::loopback(), 0});
    return sock.getsockname();
}

// Its close() throws.
struct sticky : dispatcher {
    int err;
    sticky(std::unique_ptr<socket_type> sock, map_type& map, int e) : dispatcher(std::move(sock), &map), err(e) {}
    void close() override {
        dispatcher::close();
        if (err == -1) throw asyncore::ExitNow();
        if (err == -2) throw std::runtime_error("stuck");
        throw std::system_error(err, std::generic_category(), "close");
    }
};

}   // namespace

TEST(dispatcher, a_connection_that_is_refused) {
    for (const bool use_poll : {false, true}) {
        map_type map;
        witness it(nullptr, &map);
        it.create_socket();
        it.connect(closed_port());
        support::run_until(
            map, [&] { return map.empty(); }, use_poll);
        CHECK_EQ(it.said, "error ");   // ECONNREFUSED is not one of DISCONNECTED
        CHECK(!it.connected);
        CHECK(!it.connecting);
    }
}

TEST(dispatcher, an_exceptional_condition_that_is_an_error) {
    map_type map;
    witness it(nullptr, &map);
    it.create_socket();
    it.connect(closed_port());
    pollfd ready{it.socket->fileno(), POLLOUT, 0};
    CHECK_EQ(::poll(&ready, 1, 5000), 1);
    it.handle_expt_event();
    CHECK_EQ(it.said, "close ");
}

TEST(dispatcher, connected_before_anything_else) {
    for (const bool use_poll : {false, true}) {
        map_type map;
        socket_type listener(AF_INET, SOCK_STREAM);
        listener.bind({"127.0.0.1", 0});
        listener.listen(1);
        witness it(nullptr, &map);
        it.create_socket();
        it.connect(listener.getsockname());
        support::run_until(
            map, [&] { return it.connected; }, use_poll);
        CHECK_EQ(it.said.substr(0, 14), "connect write ");
        CHECK(!it.connecting);
        CHECK_EQ(it.repr().substr(0, 41), "<asyncore.dispatcher connected 127.0.0.1:");
        CHECK_EQ(it.addr.port, listener.getsockname().port);
    }
}

// As in Python: the first one may find out what the loop knew, after that it is EISCONN.
TEST(dispatcher, connect_when_it_is_connected) {
    map_type map;
    socket_type listener(AF_INET, SOCK_STREAM);
    listener.bind({"127.0.0.1", 0});
    listener.listen(1);
    witness it(nullptr, &map);
    it.create_socket();
    it.connect(listener.getsockname());
    support::run_until(map, [&] { return it.connected; });
    it.said.clear();
    it.connect(listener.getsockname());
    it.connect(listener.getsockname());
    CHECK_EQ(it.said, "connect connect ");
    CHECK(it.connected);
}

TEST(dispatcher, connected_at_once) {
    map_type map;
    socket_type listener(AF_UNIX, SOCK_STREAM);
    const std::string path = "/tmp/smtpd-test-" + std::to_string(::getpid()) + ".sock";
    ::unlink(path.c_str());
    listener.bind(asyncore::address::unix_path(path));
    listener.listen(1);
    witness it(nullptr, &map);
    it.create_socket(AF_UNIX);
    it.connect(asyncore::address::unix_path(path));
    ::unlink(path.c_str());
    CHECK_EQ(it.said, "connect ");
    CHECK(it.connected);
}

TEST(dispatcher, closed_behind_its_back) {
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto both = wire::pair();
        witness it(std::move(both.second), &map);
        ::close(it.socket->fileno());
        if (use_poll) {
            asyncore::poll2(5.0, &map);
            CHECK_EQ(it.said, "close ");
        } else {
            CHECK_THROWS(asyncore::poll(5.0, &map), std::system_error);   // EBADF, as in Python
            it.close();                                                   // which it takes for granted
        }
        CHECK(map.empty());
    }
}

TEST(dispatcher, what_it_is_called) {
    map_type map;
    dispatcher it(nullptr, &map);
    it.create_socket();
    it.bind({"127.0.0.1", 0});
    it.listen(1);
    CHECK_EQ(it.repr().substr(0, 45), "<asyncore.dispatcher listening 127.0.0.1:0 at");
    auto [end, sock] = wire::pair();
    dispatcher other(std::move(sock), &map);
    CHECK_EQ(other.repr().substr(0, 37), "<asyncore.dispatcher connected '' at ");
    const auto six = asyncore::getaddrinfo({"::1", 25}).front();
    CHECK_EQ(six.repr(), "('::1', 25, 0, 0)");
    CHECK_EQ(asyncore::address("a'b", 25).repr(), "(\"a'b\", 25)");
    CHECK_EQ(asyncore::address("a", 25).str(), "a:25");
    for (const auto& same : {six, asyncore::address::unix_path("/x"), asyncore::address()})
        CHECK_EQ(same.str(), same.repr());
    CHECK_EQ(asyncore::address::unix_path("/x").repr(), "'/x'");
    CHECK_EQ(asyncore::address().repr(), "None");
    CHECK_THROWS(asyncore::address("a", -1), std::out_of_range);
    CHECK_THROWS(asyncore::address("a", 65536), std::out_of_range);
    CHECK_THROWS(asyncore::address::unix_path(std::string(200, 'x')), std::out_of_range);
}

TEST(dispatcher, each_class_has_its_name) {
    int fds[2];
    CHECK_EQ(::pipe(fds), 0);
    {
        map_type map;
        asyncore::file_dispatcher file(fds[0], &map);
        CHECK_EQ(file.repr().substr(0, 36), "<asyncore.file_dispatcher connected ");
    }
    ::close(fds[0]);
    ::close(fds[1]);
    CHECK_EQ(asyncore::dispatcher_with_send().repr().substr(0, 33), "<asyncore.dispatcher_with_send at");
    CHECK_EQ(asynchat::async_chat().repr().substr(0, 23), "<asynchat.async_chat at");
}

TEST(dispatcher, repr_of_any_bytes) {
    CHECK_EQ(asyncore::repr("a\\b\tc\r\n\x7f\xff"), "'a\\\\b\\tc\\r\\n\\x7f\\xff'");
    CHECK_EQ(asyncore::repr("it's", "b"), "b\"it's\"");
    CHECK_EQ(asyncore::repr("it's \"so\""), "'it\\'s \"so\"'");
}

TEST(dispatcher, nobody_wants_the_connection) {
    map_type map;
    dispatcher it(nullptr, &map);
    it.ignore_log_types.clear();
    it.create_socket();
    it.bind({"127.0.0.1", 0});
    it.listen(1);
    auto end = wire::tcp("127.0.0.1", it.socket->getsockname().port);
    captured out(std::cout);
    CHECK_EQ(support::wait_for_eof(map, end), "");
    CHECK_EQ(out.text(), "warning: unhandled accepted event\n");
    CHECK_EQ(map.size(), 1u);
}

TEST(dispatcher, nobody_waits_to_be_accepted) {
    struct listener : witness {
        using witness::witness;
        void handle_accepted(std::unique_ptr<socket_type>, const asyncore::address&) override { said += "accepted "; }
    };
    map_type map;
    listener it(nullptr, &map);
    it.create_socket();
    it.bind({"127.0.0.1", 0});
    it.listen(1);
    CHECK(!it.accept());
    asyncore::read(it);    // somebody was there, and has gone
    asyncore::write(it);   // a listener has nothing to write
    CHECK_EQ(it.said, "");
    CHECK(it.accepting);
}

// ENOTSOCK is no reason to take it for a socket that is not connected.
TEST(dispatcher, a_pipe_is_no_socket) {
    int fds[2];
    CHECK_EQ(::pipe(fds), 0);
    map_type map;
    CHECK_THROWS(witness(std::make_unique<socket_type>(fds[0]), &map), std::system_error);
    CHECK(map.empty());
    ::close(fds[1]);
}

// What a peer that has gone does not explain is an exception.
TEST(dispatcher, a_device_that_is_full) {
    const int fd = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
    if (fd < 0) SKIP("no /dev/full");
    map_type map;
    asyncore::file_dispatcher it(fd, &map);
    ::close(fd);
    CHECK_THROWS(it.send("x"), std::system_error);
    CHECK(it.connected);
    CHECK_EQ(map.size(), 1u);
}

// No exception: there is nothing else to see.
TEST(dispatcher, set_reuse_addr_is_not_vital) {
    map_type map;
    dispatcher it(nullptr, &map);
    it.create_socket();
    it.socket->close();
    it.set_reuse_addr();
}

TEST(dispatcher, the_log_names_what_was_thrown) {
    struct failing : dispatcher {
        std::function<void()> fail;
        using dispatcher::dispatcher;
        void handle_read() override { fail(); }
    };
    const std::pair<std::function<void()>, std::string> table[] = {
        {[] { throw std::bad_alloc(); }, "(std::bad_alloc:"},
        {[] { throw std::bad_function_call(); }, "(std::exception:"},
        {[] { throw std::out_of_range("far"); }, "(std::logic_error:far)"},
        {[] { throw std::system_error(EIO, std::generic_category(), "disk"); }, "(std::system_error:disk: "},
        {[] { throw 5; }, "(unknown exception:)"}};
    for (const auto& [fail, text] : table)
        for (const bool use_poll : {false, true}) {
            map_type map;
            auto [end, sock] = wire::pair();
            failing it(std::move(sock), &map);
            it.fail = fail;
            end.send("x");
            captured out(std::cout);
            pass(map, use_poll, 5.0);
            CHECK(out.text().find(text) != std::string::npos);
            CHECK(map.empty());
        }
}

TEST(dispatcher, ExitNow_leaves_the_loop_from_anywhere) {
    struct leaving : dispatcher {
        bool in_log = false;
        using dispatcher::dispatcher;
        void handle_read() override { throw std::runtime_error("first"); }
        void log_info(std::string_view, std::string_view) override {
            if (in_log) throw asyncore::ExitNow();
        }
        void handle_close() override {
            close();
            throw asyncore::ExitNow();
        }
    };
    for (const bool use_poll : {false, true})
        for (const bool in_log : {false, true}) {
            map_type map;
            auto [end, sock] = wire::pair();
            leaving it(std::move(sock), &map);
            it.in_log = in_log;
            end.send("x");
            CHECK_THROWS(pass(map, use_poll, 5.0), asyncore::ExitNow);
        }
}

TEST(dispatcher, recv_and_send) {
    map_type map;
    auto [end, sock] = wire::pair();
    witness it(std::move(sock), &map);
    int err = 0;
    try {
        it.recv(10);
    } catch (const std::system_error& error) {
        err = error.code().value();
    }
    CHECK(err == EAGAIN || err == EWOULDBLOCK);
    end.send(std::string("a\0b", 3));
    CHECK_EQ(it.recv(2), std::string("a\0", 2));
    CHECK_EQ(it.recv(10), "b");
    CHECK_EQ(it.send(std::string("\0x", 2)), 2u);
    CHECK_EQ(end.take(), std::string("\0x", 2));
    while (it.send(std::string(100000, 'x')) > 0) {}   // it is full: 0, no error
    CHECK(it.connected);
    end.close();
    CHECK_EQ(it.send("x"), 0u);
    CHECK_EQ(it.said, "close ");
}

TEST(dispatcher, a_timeout_that_nobody_handles) {
    struct timed : dispatcher {
        using dispatcher::dispatcher;
        bool writable() override { return false; }
        asyncore::clock::time_point deadline() override { return asyncore::clock::time_point::min(); }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        timed it(std::move(sock), &map);
        it.ignore_log_types.clear();
        captured out(std::cout);
        pass(map, use_poll, 5.0);
        CHECK_EQ(out.text(), "warning: unhandled timeout event\n");
        CHECK(map.empty());
    }
}

TEST(dispatcher, another_socket) {
    map_type map;
    auto [first_end, first] = wire::pair();
    auto [second_end, second] = wire::pair();
    witness it(std::move(first), &map);
    it.set_socket(std::move(second));
    CHECK_EQ(map.size(), 1u);
    CHECK(map.get(it.socket->fileno()) == &it);
    first_end.receive_all();
    CHECK(first_end.eof);
    second_end.send("x");
    pass(map, false);
    CHECK_EQ(it.said.substr(0, 5), "read ");
}

// Under poll(): one that has closed already is not told so once more.
TEST(dispatcher, it_closes_and_throws) {
    struct failing : witness {
        std::error_code why;
        bool closes = true;
        using witness::witness;
        void handle_read() override {
            if (closes) close();
            throw std::system_error(why);
        }
    };
    const std::tuple<std::error_code, bool, std::string> table[] = {
        {{ECONNRESET, std::generic_category()}, true, ""},
        {{ECONNRESET, std::generic_category()}, false, "close "},
        {{EIO, std::generic_category()}, false, "error "},
        {{ECONNRESET, asyncore::gai_category()}, false, "error "}};
    for (const auto& [why, closes, said] : table) {
        map_type map;
        auto [end, sock] = wire::pair();
        failing it(std::move(sock), &map);
        it.why = why;
        it.closes = closes;
        end.send("x");
        pass(map, true, 5.0);
        CHECK_EQ(it.said, said);
        CHECK(map.empty());
    }
}

TEST(dispatcher, a_file_is_no_socket) {
    int fds[2];
    CHECK_EQ(::pipe(fds), 0);
    {
        asyncore::file_wrapper it(fds[0]);
        CHECK_EQ(it.getsockopt(SOL_SOCKET, SO_ERROR), 0);
        CHECK_THROWS(it.getsockopt(SOL_SOCKET, SO_REUSEADDR), asyncore::NotImplementedError);
        CHECK_THROWS(it.getsockopt(IPPROTO_TCP, SO_ERROR), asyncore::NotImplementedError);
        CHECK_THROWS(asyncore::file_wrapper(-1), std::system_error);
    }
    ::close(fds[0]);
    ::close(fds[1]);
}

TEST(socket, once_closed_every_call_fails) {
    socket_type sock(AF_INET, SOCK_STREAM);
    sock.close();
    const auto where = asyncore::getaddrinfo({"127.0.0.1", 1}).front();
    char byte;
    const std::function<void()> calls[] = {[&] { sock.recv(&byte, 1); },
                                           [&] { sock.send("x"); },
                                           [&] { sock.getsockopt(SOL_SOCKET, SO_ERROR); },
                                           [&] { sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); },
                                           [&] { sock.setblocking(true); },
                                           [&] { sock.bind(where); },
                                           [&] { sock.listen(1); },
                                           [&] { sock.accept(); },
                                           [&] { sock.getpeername(); },
                                           [&] { sock.getsockname(); }};
    for (const auto& call : calls) CHECK_THROWS(call(), std::system_error);
    CHECK_EQ(sock.connect_ex(where), EBADF);
    sock.close();   // but not this one
    CHECK_THROWS(socket_type(AF_INET, -1), std::system_error);
}

TEST(socket, an_address_that_is_none) {
    for (const int family : {AF_INET, AF_INET6}) {
        asyncore::address name("localhost", 25);
        name.family = family;   // it says that it is numeric
        CHECK_THROWS(socket_type(AF_INET, SOCK_STREAM).bind(name), std::system_error);
    }
    try {
        asyncore::getaddrinfo({"999.999.999.999", 25});
        CHECK(false);
    } catch (const std::system_error& error) {
        CHECK(error.code().category() == asyncore::gai_category());
        CHECK_EQ(std::string(error.code().category().name()), "getaddrinfo");
    }
}

namespace {

int signals = 0, signals_end = -1;

extern "C" void on_alarm(int) {
    if (++signals == 3 && ::write(signals_end, "x", 1) < 0) std::abort();
}

// An alarm each 5 ms, which interrupts calls; the third sends a byte.
struct alarms {
    struct sigaction before {};

    explicit alarms(int end) {
        signals = 0;
        signals_end = end;
        struct sigaction action {};
        action.sa_handler = on_alarm;
        ::sigaction(SIGALRM, &action, &before);
        every(5000);
    }
    ~alarms() {
        every(0);
        ::sigaction(SIGALRM, &before, nullptr);
    }
    alarms(const alarms&) = delete;
    alarms& operator=(const alarms&) = delete;

  private:
    static void every(suseconds_t microseconds) {
        const itimerval timer{{0, microseconds}, {0, microseconds}};
        ::setitimer(ITIMER_REAL, &timer, nullptr);
    }
};

}   // namespace

// PEP 475
TEST(socket, a_signal_interrupts_no_call) {
    auto [end, sock] = wire::pair();
    sock->setblocking(true);
    char byte = 0;
    const alarms now(end.fd());
    CHECK_EQ(sock->recv(&byte, 1), 1u);
    CHECK_EQ(byte, 'x');
    CHECK(signals >= 3);
}

TEST(loop, a_signal_does_not_end_the_wait) {
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        struct reading : witness {
            using witness::witness;
            bool writable() override { return false; }
        } it(std::move(sock), &map);
        const alarms now(end.fd());
        pass(map, use_poll, std::nullopt);   // for ever, or until something comes
        CHECK_EQ(it.said, "read ");
    }
}

TEST(loop, an_object_that_closes_when_it_is_asked) {
    struct shy : witness {
        using witness::witness;
        bool readable() override {
            close();
            return true;
        }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        shy it(std::move(sock), &map);
        end.send("x");
        pass(map, use_poll);
        CHECK_EQ(it.said, "");
        CHECK(map.empty());
    }
}

// One that is asked may close another one, which was asked before.
// Deviation 58
TEST(loop, an_object_that_closes_another_when_it_is_asked) {
    struct closer : asyncore::dispatcher {
        std::string when;
        asyncore::dispatcher* other = nullptr;
        using dispatcher::dispatcher;
        void at(const std::string& question) {
            if (when == question && other) std::exchange(other, nullptr)->close();
        }
        bool readable() override { return at("readable"), true; }
        bool writable() override { return at("writable"), false; }
        asyncore::clock::time_point deadline() override { return at("deadline"), asyncore::never; }
        void handle_read() override { recv(100); }
    };
    for (const bool use_poll : {false, true})
        for (const std::string question : {"readable", "writable", "deadline"}) {
            asyncore::map_type map;
            auto [first_end, first_sock] = wire::pair();
            auto [second_end, second_sock] = wire::pair();
            closer first(std::move(first_sock), &map), second(std::move(second_sock), &map);
            (first._fileno < second._fileno ? second : first).other = first._fileno < second._fileno ? &first : &second;
            first.when = second.when = question;
            pass(map, use_poll, 0.0);
            CHECK_EQ(map.size(), 1u);
            (first.connected ? first_end : second_end).send("x");
            pass(map, use_poll, 5.0);
            CHECK_EQ(map.size(), 1u);
        }
}

// A descriptor that was closed behind its object's back is the program's mistake, as in Python.
TEST(loop, a_descriptor_that_was_closed_behind_its_back) {
    asyncore::map_type map;
    auto [end, sock] = wire::pair();
    witness it(std::move(sock), &map);
    const int fd = it._fileno;
    ::close(fd);
    CHECK_THROWS(asyncore::poll(0.0, &map), std::system_error);
    CHECK_EQ(::dup2(end.fd(), fd), fd);   // for its owner to close
}

// Without a socket there is nothing to do any of it with.
TEST(dispatcher, without_a_socket) {
    asyncore::map_type map;
    asyncore::dispatcher it(nullptr, &map);
    char byte;
    CHECK_THROWS(it.bind({"127.0.0.1", 0}), std::logic_error);
    CHECK_THROWS(it.listen(5), std::logic_error);
    CHECK_THROWS(it.connect({"127.0.0.1", 1}), std::logic_error);
    CHECK_THROWS(it.accept(), std::logic_error);
    CHECK_THROWS(it.send("x"), std::logic_error);
    CHECK_THROWS(it.recv(1), std::logic_error);
    CHECK_THROWS(it.recv_into(&byte, 1), std::logic_error);
    CHECK_THROWS(it.set_reuse_addr(), std::logic_error);
    CHECK_THROWS(it.handle_connect_event(), std::logic_error);
    CHECK_THROWS(it.handle_expt_event(), std::logic_error);
    CHECK_THROWS(it.set_socket(nullptr), std::invalid_argument);
    CHECK_THROWS(map.own(nullptr), std::invalid_argument);
    it.close();
}

// What an exception leaves of the input is looked at in the next pass.
// Deviation 61
TEST(loop, input_behind_an_exception) {
    struct surviving : asynchat::async_chat {
        std::vector<std::string> lines;
        using async_chat::async_chat;
        void collect_incoming_data(std::string_view data) override { _collect_incoming_data(data); }
        void found_terminator() override {
            lines.push_back(_get_data());
            if (lines.size() == 1) throw std::runtime_error("the first one");
        }
        void handle_error() override {}
    };
    asyncore::map_type map;
    auto [end, sock] = wire::pair();
    surviving it(std::move(sock), &map);
    it.set_terminator("\n");
    end.send("1\n2\n3\n");
    asyncore::poll(5.0, &map);
    CHECK_EQ(it.lines.size(), 1u);
    asyncore::poll(5.0, &map);
    CHECK_EQ(it.lines.size(), 3u);
}

TEST(loop, an_empty_map_returns_at_once) {
    map_type map;
    const auto before = asyncore::clock::now();
    asyncore::loop(5.0, false, &map);
    asyncore::loop(5.0, true, &map);
    asyncore::loop();
    asyncore::poll2(5.0, &map);
    CHECK(asyncore::clock::now() - before < std::chrono::seconds(4));
}

TEST(loop, so_many_passes) {
    struct counting : witness {
        int passes = 0;
        using witness::witness;
        bool readable() override { return ++passes > 0; }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        counting it(std::move(sock), &map);
        asyncore::loop(0.0, use_poll, &map, 3);
        CHECK_EQ(it.passes, 3);
        asyncore::loop(0.0, use_poll, &map, 0);
        CHECK_EQ(it.passes, 3);
    }
}

TEST(loop, waits_as_long_as_it_is_told) {
    struct silent : dispatcher {
        using dispatcher::dispatcher;
        bool writable() override { return false; }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        silent it(std::move(sock), &map);
        const auto before = asyncore::clock::now();
        pass(map, use_poll, 0.015);
        CHECK(asyncore::clock::now() - before >= std::chrono::milliseconds(14));
    }
    map_type map;
    auto [end, sock] = wire::pair();
    silent it(std::move(sock), &map);
    CHECK_THROWS(asyncore::poll(-1.0, &map), std::invalid_argument);   // select() has no such time
}

// None, a negative number for poll(), and what is beyond all clocks.
TEST(loop, a_timeout_that_is_for_ever) {
    for (const std::optional<double> timeout : {std::optional<double>(), std::optional(1e300), std::optional(-1.0)})
        for (const bool use_poll : {false, true}) {
            if (!use_poll && timeout == -1.0) continue;
            map_type map;
            auto [end, sock] = wire::pair();
            struct leaving : witness {
                using witness::witness;
                bool writable() override { return false; }
                void handle_read() override { close(); }
            } it(std::move(sock), &map);
            end.send("x");
            asyncore::loop(timeout, use_poll, &map);
            CHECK(map.empty());
        }
}

TEST(loop, what_readable_throws_leaves_it) {
    struct failing : dispatcher {
        using dispatcher::dispatcher;
        bool readable() override { throw std::runtime_error("no"); }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        failing it(std::move(sock), &map);
        CHECK_THROWS(pass(map, use_poll), std::runtime_error);
        CHECK_EQ(map.size(), 1u);
    }
}

TEST(loop, close_all_and_what_close_throws) {
    for (const bool ignore_all : {false, true})
        for (const int err : {EBADF, ENOTCONN, -1, -2}) {
            map_type map;
            auto [end, sock] = wire::pair();
            auto [other_end, other_sock] = wire::pair();
            sticky it(std::move(sock), map, err);
            dispatcher other(std::move(other_sock), &map);
            bool passed_on = false;
            try {
                asyncore::close_all(&map, ignore_all);
            } catch (const std::exception&) {
                passed_on = true;
            }
            CHECK_EQ(passed_on, err == -1 || (err != EBADF && !ignore_all));
            if (!passed_on) CHECK(map.empty());
        }
}

TEST(dispatcher_with_send, everything_arrives_in_order) {
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto both = wire::pair();
        wire& end = both.first;
        asyncore::dispatcher_with_send it(std::move(both.second), &map);
        it.socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
        std::string expected;
        for (int i = 0; i < 50; ++i) {
            const std::string piece(3000, static_cast<char>('a' + i % 26));
            CHECK_EQ(it.send(piece), piece.size());
            expected += piece;
        }
        CHECK(it.writable());
        std::string heard;
        support::run_until(
            map,
            [&] {
                heard += end.take();
                return heard.size() >= expected.size();
            },
            use_poll);
        CHECK(heard == expected);
        CHECK(!it.writable());
    }
}

TEST(dispatcher_with_send, debug_tells_what_is_sent) {
    map_type map;
    auto [end, sock] = wire::pair();
    asyncore::dispatcher_with_send it(std::move(sock), &map);
    it.debug = true;
    captured out(std::cout);
    it.send("a\x1b");
    CHECK_EQ(out.text(), "info: sending b'a\\x1b'\n");
    CHECK_EQ(end.take(), "a\x1b");
}
