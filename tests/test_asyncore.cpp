// CPython's test_asyncore, case by case: the same names, the same steps. One thread does for the server that
// Python starts in another one.

#include <cstdlib>
#include <cstring>

#include "dialog.hpp"
#include "test.hpp"

using asyncore::address;
using asyncore::dispatcher;
using asyncore::map_type;
using asyncore::socket_type;
using support::captured;
using support::wire;

namespace {

// Each of its handlers throws ExitNow.
class exitingdummy : public dispatcher {
  public:
    explicit exitingdummy(map_type& map) : dispatcher(nullptr, &map) {}
    void handle_read_event() override { throw asyncore::ExitNow(); }
    void handle_write_event() override { throw asyncore::ExitNow(); }
    void handle_close() override { throw asyncore::ExitNow(); }
    void handle_expt_event() override { throw asyncore::ExitNow(); }
};

// Each of its handlers throws, and it knows when that has been handled.
class crashingdummy : public dispatcher {
  public:
    bool error_handled = false;

    explicit crashingdummy(map_type& map) : dispatcher(nullptr, &map) {}
    void handle_read_event() override { throw std::runtime_error("crash"); }
    void handle_write_event() override { throw std::runtime_error("crash"); }
    void handle_close() override { throw std::runtime_error("crash"); }
    void handle_expt_event() override { throw std::runtime_error("crash"); }
    void handle_error() override { error_handled = true; }
};

std::string unused_path() {
    static int count = 0;
    const char* tmp = std::getenv("TMPDIR");
    return std::string(tmp && *tmp ? tmp : "/tmp") + "/smtpd-test-" + std::to_string(::getpid()) + "-" +
           std::to_string(++count);
}

// A file that goes with the test.
class temporary_file {
  public:
    const std::string path = unused_path();

    explicit temporary_file(const std::string& content) {
        const int fd = open(O_WRONLY | O_CREAT);
        CHECK_EQ(::write(fd, content.data(), content.size()), static_cast<ssize_t>(content.size()));
        ::close(fd);
    }
    ~temporary_file() { ::unlink(path.c_str()); }
    temporary_file(const temporary_file&) = delete;
    temporary_file& operator=(const temporary_file&) = delete;

    int open(int flags) const {
        const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0600);
        if (fd < 0) throw std::runtime_error("cannot open " + path);
        return fd;
    }
    std::string content() const {
        char buffer[1024];
        const int fd = open(O_RDONLY);
        const ssize_t size = ::read(fd, buffer, sizeof buffer);
        ::close(fd);
        return std::string(buffer, static_cast<std::size_t>(size));
    }
};

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// The free functions
// ---------------------------------------------------------------------------------------------------------

TEST(HelperFunctionTests, test_readwriteexc) {
    map_type map;
    exitingdummy exiting(map);
    CHECK_THROWS(asyncore::read(exiting), asyncore::ExitNow);
    CHECK_THROWS(asyncore::write(exiting), asyncore::ExitNow);
    CHECK_THROWS(asyncore::_exception(exiting), asyncore::ExitNow);
    for (const auto deliver : {asyncore::read, asyncore::write, asyncore::_exception}) {
        crashingdummy crashing(map);
        deliver(crashing);
        CHECK(crashing.error_handled);
    }
}

TEST(HelperFunctionTests, test_readwrite) {
    struct recording : dispatcher {
        std::string said;
        explicit recording(map_type& map) : dispatcher(nullptr, &map) {}
        void handle_read_event() override { said += "read "; }
        void handle_write_event() override { said += "write "; }
        void handle_close() override { said += "close "; }
        void handle_expt_event() override { said += "expt "; }
    };
    const std::pair<short, std::string> flags[] = {{POLLIN, "read "},   {POLLPRI, "expt "},  {POLLOUT, "write "},
                                                   {POLLERR, "close "}, {POLLHUP, "close "}, {POLLNVAL, "close "}};
    map_type map;
    for (const auto& [flag, event] : flags) {
        recording object(map);
        asyncore::readwrite(object, flag);
        CHECK_EQ(object.said, event);

        exitingdummy exiting(map);
        CHECK_THROWS(asyncore::readwrite(exiting, flag), asyncore::ExitNow);

        crashingdummy crashing(map);
        asyncore::readwrite(crashing, flag);
        CHECK(crashing.error_handled);
    }
}

// Ten dispatchers; after close_all() the map is empty and no socket is open.
static void close_ten(map_type& map, map_type* argument) {
    std::vector<wire> others;
    std::vector<std::unique_ptr<dispatcher>> ten;
    for (int i = 0; i < 10; ++i) {
        auto [end, sock] = wire::pair();
        others.push_back(std::move(end));
        ten.push_back(std::make_unique<dispatcher>(std::move(sock), &map));
    }
    CHECK_EQ(map.size(), 10u);
    asyncore::close_all(argument);
    CHECK(map.empty());
    for (auto& end : others) {
        end.receive();
        CHECK(end.eof);
    }
}

TEST(HelperFunctionTests, test_closeall) {
    map_type map;
    close_ten(map, &map);
}

TEST(HelperFunctionTests, test_closeall_default) {
    CHECK(asyncore::socket_map.empty());
    close_ten(asyncore::socket_map, nullptr);
}

// Python's is made of the traceback. Here the type and what() stand for it, where Python prints it.
TEST(HelperFunctionTests, test_compact_traceback) {
    struct failing : dispatcher {
        explicit failing(map_type& map) : dispatcher(nullptr, &map) {}
        void handle_read_event() override { throw std::runtime_error("no \n reason"); }
    };
    map_type map;
    failing object(map);
    const std::string name = object.repr();
    captured out(std::cout);
    asyncore::read(object);
    CHECK_EQ(out.text(),
             "error: uncaptured C++ exception, closing channel " + name + " (std::runtime_error:no \\n reason)\n");
}

// ---------------------------------------------------------------------------------------------------------
// dispatcher
// ---------------------------------------------------------------------------------------------------------

TEST(DispatcherTests, test_basic) {
    dispatcher d;
    CHECK(d.readable());
    CHECK(d.writable());
}

TEST(DispatcherTests, test_repr) {
    dispatcher d;
    char expected[64];
    std::snprintf(expected, sizeof expected, "<asyncore.dispatcher at %p>", static_cast<void*>(&d));
    CHECK_EQ(d.repr(), expected);
}

TEST(DispatcherTests, test_log) {
    dispatcher d;
    captured err(std::cerr);
    d.log("Lovely spam! Wonderful spam!");
    d.log("I don't like spam!");
    CHECK_EQ(err.text(), "log: Lovely spam! Wonderful spam!\nlog: I don't like spam!\n");
}

TEST(DispatcherTests, test_log_info) {
    dispatcher d;
    captured out(std::cout);
    d.log_info("Have you got anything without spam?", "EGGS");
    d.log_info("Why can't she have egg bacon spam and sausage?");
    d.log_info("THAT'S got spam in it!", "SPAM");
    CHECK_EQ(out.text(),
             "EGGS: Have you got anything without spam?\n"
             "info: Why can't she have egg bacon spam and sausage?\n"
             "SPAM: THAT'S got spam in it!\n");
}

TEST(DispatcherTests, test_unhandled) {
    dispatcher d;
    captured out(std::cout);
    d.handle_read();   // warnings are not logged by default
    CHECK_EQ(out.text(), "");
    d.ignore_log_types.clear();
    d.handle_expt();
    d.handle_read();
    d.handle_write();
    d.handle_connect();
    CHECK_EQ(out.text(),
             "warning: unhandled incoming priority event\n"
             "warning: unhandled read event\n"
             "warning: unhandled write event\n"
             "warning: unhandled connect event\n");
}

TEST(DispatcherTests, test_strerror) {
    CHECK_EQ(asyncore::_strerror(EPERM), std::string(std::strerror(EPERM)));
    CHECK(!asyncore::_strerror(-1).empty());
}

TEST(DispatcherWithSendTests, test_send) {
    const std::string data = "Suppose there isn't a 16-ton weight?";
    struct dispatcherwithsend_noread : asyncore::dispatcher_with_send {
        explicit dispatcherwithsend_noread(map_type& map) : dispatcher_with_send(nullptr, &map) {}
        bool readable() override { return false; }
        void handle_connect() override {}
    };
    map_type map;
    socket_type listener(AF_INET, SOCK_STREAM);
    listener.bind({"127.0.0.1", 0});
    listener.listen(1);

    dispatcherwithsend_noread d(map);
    d.create_socket();
    d.connect({"127.0.0.1", listener.getsockname().port});
    d.send(data);
    d.send(data);
    d.send("\n");
    support::run_until(map, [&] { return d.connected && d.out_buffer.empty(); });
    d.close();
    wire server(std::move(*listener.accept().first));
    CHECK_EQ(support::wait_for_eof(map, server), data + data + "\n");
}

// ---------------------------------------------------------------------------------------------------------
// file_wrapper and file_dispatcher
// ---------------------------------------------------------------------------------------------------------

static const std::string PARROT = "It's not dead, it's sleeping!";

static std::string recv(socket_type& from, std::size_t size) {
    std::string buffer(size, '\0');
    buffer.resize(from.recv(&buffer[0], size));
    return buffer;
}

TEST(FileWrapperTest, test_recv) {
    temporary_file file(PARROT);
    const int fd = file.open(O_RDONLY);
    asyncore::file_wrapper w(fd);
    ::close(fd);
    CHECK(w.fileno() != fd);
    CHECK_EQ(recv(w, 13), "It's not dead");
    char buffer[6];
    CHECK_EQ(w.read(buffer, 6), 6u);
    CHECK_EQ(std::string(buffer, 6), ", it's");
    w.close();
    CHECK_THROWS(w.read(buffer, 1), std::system_error);
}

TEST(FileWrapperTest, test_send) {
    temporary_file file(PARROT);
    const int fd = file.open(O_WRONLY | O_APPEND);
    asyncore::file_wrapper w(fd);
    ::close(fd);
    CHECK_EQ(w.write("Come again?"), 11u);
    CHECK_EQ(w.send("I want to buy some cheese."), 26u);
    w.close();
    CHECK_EQ(file.content(), PARROT + "Come again?I want to buy some cheese.");
}

TEST(FileWrapperTest, test_dispatcher) {
    struct reader : asyncore::file_dispatcher {
        std::vector<std::string> data;
        using file_dispatcher::file_dispatcher;
        void handle_read() override { data.push_back(recv(29)); }
    };
    temporary_file file(PARROT);
    const int fd = file.open(O_RDONLY);
    map_type map;
    reader s(fd, &map);
    ::close(fd);
    asyncore::loop(0.01, true, &map, 2);
    CHECK_EQ(support::list(s.data), support::list({PARROT, ""}));
    CHECK(map.empty());   // the end of the file has closed it
}

// Python warns that a wrapper was dropped without a close(), and closes it. Here that is the way to do it.
TEST(FileWrapperTest, test_resource_warning) {
    temporary_file file(PARROT);
    const int fd = file.open(O_RDONLY);
    int inside = -1;
    {
        asyncore::file_wrapper f(fd);
        ::close(fd);
        inside = f.fileno();
        CHECK(is_open(inside));
    }
    CHECK(!is_open(inside));
}

TEST(FileWrapperTest, test_close_twice) {
    temporary_file file(PARROT);
    const int fd = file.open(O_RDONLY);
    asyncore::file_wrapper f(fd);
    ::close(fd);
    ::close(f.fileno());   // behind its back
    int err = 0;
    try {
        f.close();
    } catch (const std::system_error& error) {
        err = error.code().value();
    }
    CHECK_EQ(err, EBADF);
    CHECK_EQ(f.fileno(), -1);
    f.close();
}

// ---------------------------------------------------------------------------------------------------------
// The interface, over each family of sockets, with select() and with poll()
// ---------------------------------------------------------------------------------------------------------

namespace {

// What it is tried with.
struct world {
    map_type map;
    int family;
    bool use_poll;
    address here;   // to listen at

    world(int f, bool p) : family(f), use_poll(p) {
        if (family == AF_UNIX) {
            here = address::unix_path(unused_path());
        } else {
            here = asyncore::getaddrinfo({family == AF_INET ? "127.0.0.1" : "::1", 0}).front();
        }
    }
    ~world() {
        if (family == AF_UNIX) ::unlink(here.host.c_str());
    }
    world(const world&) = delete;
    world& operator=(const world&) = delete;

    void loop_waiting_for_flag(const bool& flag) {
        support::run_until(
            map, [&] { return flag; }, use_poll);
    }
};

[[noreturn]] void not_supposed(const char* what) {
    throw std::logic_error(std::string(what) + " not supposed to be called");
}

struct base_handler : dispatcher {
    bool flag = false;
    using dispatcher::dispatcher;
    void handle_accept() override { not_supposed("handle_accept"); }
    void handle_accepted(std::unique_ptr<socket_type>, const address&) override { not_supposed("handle_accepted"); }
    void handle_connect() override { not_supposed("handle_connect"); }
    void handle_expt() override { not_supposed("handle_expt"); }
    void handle_close() override { not_supposed("handle_close"); }
    void handle_error() override { throw; }
};

// Listens; each client gets a handler, which the map owns.
template <typename Handler>
struct base_server : dispatcher {
    explicit base_server(world& in) : dispatcher(nullptr, &in.map) {
        create_socket(in.family);
        set_reuse_addr();
        bind(in.here);
        listen(5);
    }
    void handle_accepted(std::unique_ptr<socket_type> sock, const address&) override {
        _map->own(std::make_unique<Handler>(std::move(sock), _map));
    }
    void handle_error() override { throw; }
    address address_of() const { return socket->getsockname(); }
};
using idle_server = base_server<base_handler>;

// To be connected when it is made: a UNIX socket is so at once, and calls handle_connect().
struct base_client : base_handler {
    explicit base_client(world& in) : base_handler(nullptr, &in.map) { create_socket(in.family); }
    void handle_connect() override {}
};

}   // namespace

static void run(int family, bool use_poll, void (*body)(world&)) {
    if (family == AF_INET6 && !support::has_ipv6()) SKIP("no IPv6");
    world in(family, use_poll);
    body(in);
}

// One test of the interface. CPython skips some of them for UNIX sockets; so do we.
#define API_TEST_INET(name)                                                 \
    static void api_##name(world& in);                                      \
    TEST(TestAPI_UseIPv4Select, name) { run(AF_INET, false, api_##name); }  \
    TEST(TestAPI_UseIPv4Poll, name) { run(AF_INET, true, api_##name); }     \
    TEST(TestAPI_UseIPv6Select, name) { run(AF_INET6, false, api_##name); } \
    TEST(TestAPI_UseIPv6Poll, name) { run(AF_INET6, true, api_##name); }    \
    static void api_##name(world& in)
#define API_TEST(name)                                                            \
    static void api_##name(world& in);                                            \
    TEST(TestAPI_UseUnixSocketsSelect, name) { run(AF_UNIX, false, api_##name); } \
    TEST(TestAPI_UseUnixSocketsPoll, name) { run(AF_UNIX, true, api_##name); }    \
    API_TEST_INET(name)

API_TEST(test_handle_connect) {
    struct test_client : base_client {
        using base_client::base_client;
        void handle_connect() override { flag = true; }
    };
    idle_server server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
}

API_TEST(test_handle_accept) {
    struct test_listener : idle_server {
        bool flag = false;
        using idle_server::idle_server;
        void handle_accept() override { flag = true; }
    };
    test_listener server(in);
    base_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(server.flag);
}

API_TEST(test_handle_accepted) {
    struct test_listener : idle_server {
        bool accept_called = false, flag = false;
        using idle_server::idle_server;
        void handle_accept() override {
            accept_called = true;
            dispatcher::handle_accept();
        }
        void handle_accepted(std::unique_ptr<socket_type> sock, const address& from) override {
            CHECK(accept_called);
            CHECK(sock->fileno() >= 0);
            CHECK_EQ(from.family, family_and_type.first);
            flag = true;
        }
    };
    test_listener server(in);
    base_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(server.flag);
}

API_TEST(test_handle_read) {
    struct test_client : base_client {
        using base_client::base_client;
        void handle_read() override { flag = true; }
    };
    struct test_handler : base_handler {
        test_handler(std::unique_ptr<socket_type> sock, map_type* map) : base_handler(std::move(sock), map) {
            send(std::string(1024, 'x'));
        }
    };
    base_server<test_handler> server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
    CHECK_EQ(client.recv(2048), std::string(1024, 'x'));
}

API_TEST(test_handle_write) {
    struct test_client : base_client {
        using base_client::base_client;
        void handle_write() override {
            CHECK(connected);
            flag = true;
        }
    };
    idle_server server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
}

API_TEST(test_handle_close) {
    // The other end closes the connection: recv() gives "" and calls handle_close().
    struct test_client : base_client {
        using base_client::base_client;
        void handle_read() override { recv(1024); }
        void handle_close() override {
            flag = true;
            close();
        }
    };
    struct test_handler : base_handler {
        test_handler(std::unique_ptr<socket_type> sock, map_type* map) : base_handler(std::move(sock), map) { close(); }
    };
    base_server<test_handler> server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
    CHECK_EQ(in.map.size(), 1u);
}

API_TEST(test_handle_close_after_conn_broken) {
    // The connection breaks while the client goes on sending: an error of send() is a close.
    struct test_client : base_client {
        using base_client::base_client;
        void handle_write() override { send(std::string(128, 'x')); }
        void handle_close() override {
            flag = true;
            close();
        }
        void handle_expt() override {
            flag = true;
            close();
        }
    };
    struct test_handler : base_handler {
        using base_handler::base_handler;
        void handle_read() override {
            recv(128);
            close();
        }
        bool writable() override { return false; }
    };
    base_server<test_handler> server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
}

API_TEST_INET(test_handle_expt) {
    struct test_client : base_client {
        std::string urgent;
        using base_client::base_client;
        void handle_expt() override {
            char buffer[1024];
            urgent.assign(buffer, socket->recv(buffer, sizeof buffer, MSG_OOB));
            flag = true;
        }
    };
    struct test_handler : base_handler {
        test_handler(std::unique_ptr<socket_type> sock, map_type* map) : base_handler(std::move(sock), map) {
            socket->send("\xf4", MSG_OOB);
        }
    };
    base_server<test_handler> server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
    CHECK_EQ(client.urgent, "\xf4");
}

API_TEST(test_handle_error) {
    // Python divides by zero, which is no exception in C++.
    struct test_client : base_client {
        using base_client::base_client;
        void handle_write() override { throw std::domain_error("division by zero"); }
        void handle_error() override {
            try {
                throw;
            } catch (const std::domain_error&) {
                flag = true;
            }
        }
    };
    idle_server server(in);
    test_client client(in);
    client.connect(server.address_of());
    in.loop_waiting_for_flag(client.flag);
}

API_TEST(test_connection_attributes) {
    idle_server server(in);
    base_client client(in);
    client.connect(server.address_of());
    CHECK(!server.connected);
    CHECK(server.accepting);
    CHECK(!client.accepting);

    asyncore::loop(0.01, in.use_poll, &in.map, 100);
    CHECK(!server.connected);
    CHECK(server.accepting);
    CHECK(client.connected);
    CHECK(!client.accepting);

    client.close();
    CHECK(!server.connected);
    CHECK(server.accepting);
    CHECK(!client.connected);
    CHECK(!client.accepting);

    server.close();
    CHECK(!server.connected);
    CHECK(!server.accepting);
}

API_TEST(test_create_socket) {
    dispatcher s(nullptr, &in.map);
    s.create_socket(in.family);
    CHECK_EQ(s.socket->getsockopt(SOL_SOCKET, SO_TYPE), SOCK_STREAM);
    CHECK_EQ(s.socket->getsockname().family, in.family);
    CHECK(::fcntl(s.socket->fileno(), F_GETFL) & O_NONBLOCK);
    CHECK(::fcntl(s.socket->fileno(), F_GETFD) & FD_CLOEXEC);
}

API_TEST_INET(test_bind) {
    dispatcher s1(nullptr, &in.map), s2(nullptr, &in.map);
    s1.create_socket(in.family);
    s1.bind(in.here);
    s1.listen(5);
    s2.create_socket(in.family);
    CHECK_THROWS(s2.bind(s1.socket->getsockname()), std::system_error);
}

API_TEST_INET(test_set_reuse_addr) {
    // A socket that is not connected is fit for the constructor.
    dispatcher s(std::make_unique<socket_type>(in.family, SOCK_STREAM), &in.map);
    CHECK(!s.connected);
    CHECK_EQ(s.socket->getsockopt(SOL_SOCKET, SO_REUSEADDR), 0);
    s.create_socket(in.family);
    s.set_reuse_addr();
    CHECK(s.socket->getsockopt(SOL_SOCKET, SO_REUSEADDR) != 0);
}

API_TEST_INET(test_quick_connect) {
    // The client is gone, by a reset, before the loop has looked: the listener lives on.
    idle_server server(in);
    {
        wire client = wire::tcp(in.family == AF_INET ? "127.0.0.1" : "::1", server.address_of().port);
        const linger at_once{1, 0};
        CHECK_EQ(::setsockopt(client.fd(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once), 0);
    }
    asyncore::loop(0.001, in.use_poll, &in.map, 5);
    CHECK(server.accepting);
    asyncore::close_all(&in.map);
}
