// asyncore where CPython's own tests do not look: the loop, errors, connections that fail, buffered output.

#include "dialog.hpp"
#include "test.hpp"

using asyncore::dispatcher;
using asyncore::map_type;
using asyncore::socket_type;
using support::captured;
using support::wire;

namespace {

void pass(map_type& map, bool use_poll, double timeout = 0.0) {
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
    sock.bind({"127.0.0.1", 0});
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
    CHECK_EQ(asyncore::address::unix_path("/x").repr(), "'/x'");
    CHECK_EQ(asyncore::address().repr(), "None");
    CHECK_THROWS(asyncore::address("a", -1), std::out_of_range);
    CHECK_THROWS(asyncore::address("a", 65536), std::out_of_range);
    CHECK_THROWS(asyncore::address::unix_path(std::string(200, 'x')), std::out_of_range);
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

TEST(dispatcher, a_file_is_no_socket) {
    int fds[2];
    CHECK_EQ(::pipe(fds), 0);
    {
        asyncore::file_wrapper it(fds[0]);
        CHECK_EQ(it.getsockopt(SOL_SOCKET, SO_ERROR), 0);
        CHECK_THROWS(it.getsockopt(SOL_SOCKET, SO_REUSEADDR), asyncore::NotImplementedError);
        CHECK_THROWS(asyncore::file_wrapper(-1), std::system_error);
    }
    ::close(fds[0]);
    ::close(fds[1]);
}

TEST(loop, an_empty_map_returns_at_once) {
    map_type map;
    const auto before = asyncore::clock::now();
    asyncore::loop(5.0, false, &map);
    asyncore::loop(5.0, true, &map);
    asyncore::loop();
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
