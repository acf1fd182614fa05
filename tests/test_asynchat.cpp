// CPython's test_asynchat, case by case: the same names, the same bytes. Its echo server is a thread that
// pauses between two pieces; here each piece is sent when the client has read the one before.

#include <type_traits>

#include "dialog.hpp"
#include "test.hpp"

using asyncore::map_type;
using support::list;
using support::wire;

namespace {

const std::string QUIT = "QUIT\n";

template <typename Terminator>
class echo_client : public asynchat::async_chat {
  public:
    std::vector<std::string> contents;
    std::string buffer;

    echo_client(map_type& map, Terminator term, int port) : async_chat(nullptr, &map) {
        create_socket(AF_INET);
        connect({"127.0.0.1", port});
        set_terminator(term);
    }
    void handle_connect() override {}
    void collect_incoming_data(std::string_view data) override { buffer += data; }
    void found_terminator() override {
        contents.push_back(buffer);
        buffer.clear();
    }
};

// A client and the server that echoes what it says.
template <typename Terminator>
class echo {
  public:
    map_type map;
    std::string heard;   // what the server has received, up to QUIT

  private:
    const bool use_poll_;
    asyncore::socket_type listener_;

  public:
    echo_client<Terminator> client;

    echo(bool use_poll, Terminator term)
        : use_poll_(use_poll), listener_(listening()), client(map, term, listener_.getsockname().port) {}

    void pass() { use_poll_ ? asyncore::poll2(5.0, &map) : asyncore::poll(5.0, &map); }

    // Until QUIT.
    void hear() {
        support::run_until(
            map, [&] { return client.connected || map.empty(); }, use_poll_);
        wire server(std::move(*listener_.accept().first));
        const auto has_quit = [&] {
            server.receive_all();
            return server.eof || server.received.find(QUIT) != std::string::npos;
        };
        support::run_until(map, has_quit, use_poll_);
        heard = server.take();
        if (const auto at = heard.find(QUIT); at != std::string::npos) heard.erase(at, QUIT.size());
        server_.emplace(std::move(server));
    }

    // Sends it back in pieces, each read by itself, and closes.
    void answer(std::size_t chunk_size) {
        server_->socket().setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);
        for (std::size_t at = 0; at < heard.size(); at += chunk_size) {
            server_->send(heard.substr(at, chunk_size));
            pass();
        }
        server_.reset();
        support::run_until(
            map, [&] { return map.empty(); }, use_poll_);
    }

    void run(std::size_t chunk_size = 1) {
        hear();
        answer(chunk_size);
    }

  private:
    static asyncore::socket_type listening() {
        asyncore::socket_type made(AF_INET, SOCK_STREAM);
        made.bind({"127.0.0.1", 0});
        made.listen(1);
        return made;
    }

    std::optional<wire> server_;
};

void line_terminator_check(bool use_poll, const std::string& term, std::size_t chunk_size) {
    echo<std::string_view> it(use_poll, term);
    it.client.push("hello ");
    it.client.push("world" + term);
    it.client.push("I'm not dead yet!" + term);
    it.client.push(QUIT);
    it.run(chunk_size);
    CHECK_EQ(list(it.client.contents), list({"hello world", "I'm not dead yet!"}));
}

void line_terminator_checks(bool use_poll, const std::string& term) {
    for (const std::size_t chunk_size : {1u, 2u, 3u}) line_terminator_check(use_poll, term, chunk_size);
}

// A number is met once; what comes after it is collected, and no more.
void numeric_terminator_check(bool use_poll, std::ptrdiff_t length) {
    const std::string data = "hello world, I'm not dead yet!\n";
    echo<std::ptrdiff_t> it(use_poll, length);
    it.client.push(data);
    it.client.push(QUIT);
    it.run();
    const auto n = static_cast<std::size_t>(length);
    CHECK_EQ(list(it.client.contents), list({data.substr(0, n)}));
    CHECK_EQ(it.client.buffer, data.substr(n));
}

template <typename T, typename = void>
struct can_be_pushed : std::false_type {};
template <typename T>
struct can_be_pushed<T, std::void_t<decltype(std::declval<asynchat::async_chat&>().push(std::declval<T>()))>>
    : std::true_type {};

}   // namespace

// One test, with select() and with poll().
#define CHAT_TEST(name)                                      \
    static void chat_##name(bool use_poll);                  \
    TEST(TestAsynchat, name) { chat_##name(false); }         \
    TEST(TestAsynchat_WithPoll, name) { chat_##name(true); } \
    static void chat_##name(bool use_poll)

CHAT_TEST(test_line_terminator1) { line_terminator_checks(use_poll, "\n"); }

CHAT_TEST(test_line_terminator2) { line_terminator_checks(use_poll, "\r\n"); }

CHAT_TEST(test_line_terminator3) { line_terminator_checks(use_poll, "qqq"); }

CHAT_TEST(test_numeric_terminator1) { numeric_terminator_check(use_poll, 1); }

CHAT_TEST(test_numeric_terminator2) { numeric_terminator_check(use_poll, 6); }

CHAT_TEST(test_none_terminator) {
    const std::string data = "hello world, I'm not dead yet!\n";
    echo<std::nullopt_t> it(use_poll, std::nullopt);
    it.client.push(data);
    it.client.push(QUIT);
    it.run();
    CHECK_EQ(list(it.client.contents), "[]");
    CHECK_EQ(it.client.buffer, data);
}

CHAT_TEST(test_simple_producer) {
    echo<std::string_view> it(use_poll, "\n");
    const std::string data = "hello world\nI'm not dead yet!\n" + QUIT;
    it.client.push_with_producer(std::make_unique<asynchat::simple_producer>(data, 8));
    it.run();
    CHECK_EQ(list(it.client.contents), list({"hello world", "I'm not dead yet!"}));
}

// Python takes a string for a producer; here it becomes one.
CHAT_TEST(test_string_producer) {
    echo<std::string_view> it(use_poll, "\n");
    const std::string data = "hello world\nI'm not dead yet!\n" + QUIT;
    it.client.push_with_producer(std::make_unique<asynchat::simple_producer>(data));
    it.run();
    CHECK_EQ(list(it.client.contents), list({"hello world", "I'm not dead yet!"}));
}

CHAT_TEST(test_empty_line) {
    echo<std::string_view> it(use_poll, "\n");
    it.client.push("hello world\n\nI'm not dead yet!\n");
    it.client.push(QUIT);
    it.run();
    CHECK_EQ(list(it.client.contents), list({"hello world", "", "I'm not dead yet!"}));
}

CHAT_TEST(test_close_when_done) {
    echo<std::string_view> it(use_poll, "\n");
    it.client.push("hello world\nI'm not dead yet!\n");
    it.client.push(QUIT);
    it.client.close_when_done();
    it.hear();
    support::run_until(
        it.map, [&] { return it.map.empty(); }, use_poll);
    CHECK(!it.client.connected);
    CHECK_EQ(list(it.client.contents), "[]");
    CHECK_EQ(it.heard, "hello world\nI'm not dead yet!\n");   // it has sent all before it closed
}

CHAT_TEST(test_push) {
    const char bytes[] = {'b', 'y', 't', 'e', 's', '\n'};
    echo<std::string_view> it(use_poll, "\n");
    it.client.push("bytes\n");
    it.client.push(std::string("bytes\n"));
    it.client.push(std::string_view(bytes, sizeof bytes));
    CHECK(!can_be_pushed<int>::value);   // Python: TypeError
    CHECK(!can_be_pushed<std::wstring>::value);
    CHECK(can_be_pushed<std::string>::value);
    it.client.push(QUIT);
    it.run();
    CHECK_EQ(list(it.client.contents), list({"bytes", "bytes", "bytes"}));
}

// A read event without anything to read is not an error.
TEST(TestAsynchatMocked, test_blockingioerror) {
    struct chat : asynchat::async_chat {
        int errors = 0;
        using async_chat::async_chat;
        void handle_error() override { ++errors; }
    };
    map_type map;
    auto [end, sock] = wire::pair();
    chat it(std::move(sock), &map);
    it.set_terminator("\n");
    it.handle_read();   // EAGAIN
    CHECK_EQ(it.errors, 0);
    CHECK(it.connected);
}

TEST(TestHelperFunctions, test_find_prefix_at_end) {
    CHECK_EQ(asynchat::find_prefix_at_end("qwerty\r", "\r\n"), 1u);
    CHECK_EQ(asynchat::find_prefix_at_end("qwertydkjf", "\r\n"), 0u);
}

TEST(TestNotConnected, test_disallow_negative_terminator) {
    map_type map;
    asynchat::async_chat client(nullptr, &map);
    CHECK_THROWS(client.set_terminator(-1), std::invalid_argument);
}

// The rest of asynchat's interface, which CPython does not test.
TEST(TestNotConnected, the_abstract_methods) {
    map_type map;
    asynchat::async_chat it(nullptr, &map);
    CHECK_THROWS(it.collect_incoming_data("x"), asyncore::NotImplementedError);
    CHECK_THROWS(it.found_terminator(), asyncore::NotImplementedError);
    it._collect_incoming_data("a");
    it._collect_incoming_data("b");
    CHECK_EQ(it._get_data(), "ab");
    CHECK_EQ(it._get_data(), "");
}
