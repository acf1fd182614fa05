// What clients do that wish a server ill, and what programs built on it do without thinking: it goes on, and keeps
// nothing that it need not keep.

#include <sys/resource.h>

#include <array>
#include <functional>
#include <iostream>
#include <memory>

#include "dialog.hpp"
#include "smtpd.hpp"
#include "support.hpp"
#include "test.hpp"

using asyncore::map_type;
using smtpd::message_options;
using smtpd::SMTPChannel;
using support::dialog;
using support::hooked;
using support::nameless;
using support::recorder;
using support::run_until;
using support::session;
using support::wire;
using namespace std::chrono_literals;

namespace {

const std::string NOT_PROCESSED = "451 Error: message not processed";
const std::string COMMAND_NOT_PROCESSED = "451 Error: command not processed";

// A server whose channels do what the test says.
template <typename Channel>
struct serving : hooked {
    using hooked::hooked;
    Channel* made = nullptr;
    std::function<void(Channel&)> prepare;
    std::unique_ptr<SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                               const asyncore::address& from) override {
        auto channel = std::make_unique<Channel>(*this, std::move(conn), from);
        made = channel.get();
        if (prepare) prepare(*channel);
        return channel;
    }
};

template <typename Channel>
struct talking {
    map_type map;
    serving<Channel> server;
    std::unique_ptr<dialog> client;

    explicit talking(const std::function<void(Channel&)>& prepare = nullptr, const smtpd::options& with = {})
        : server(map, with) {
        server.prepare = prepare;
        client = std::make_unique<dialog>(map, wire::to(server));
        client->hear("220 mx.test " + std::string(smtpd::version) + "\r\n");
    }
    Channel& channel() { return *server.made; }
    void line(const std::string& item, const std::string& answer) { client->line(item, answer); }
};

void reset(wire& client) {
    const linger at_once{1, 0};
    ::setsockopt(client.fd(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    client.close();
}

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// Clients that leave, and clients that do not
// ---------------------------------------------------------------------------------------------------------

static void gone_while_owed(bool use_poll, bool input_waits) {
    map_type map;
    hooked server(map);
    std::vector<smtpd::deferred_reply> owed;
    server.hook = [&](const message_options& kwargs) {
        owed.push_back(kwargs.defer());
        return std::nullopt;
    };
    wire client = wire::tcp("127.0.0.1", server.port());
    client.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n");
    run_until(
        map, [&] { return owed.size() == 1; }, use_poll);
    if (input_waits) client.send(std::string(1000, 'x'));
    reset(client);
    const auto start = asyncore::clock::now();
    std::size_t passes = 0;
    run_until(
        map, [&] { return ++passes, map.size() == 1; }, use_poll);
    CHECK(asyncore::clock::now() - start < 3s);
    CHECK(passes < 400);   // each waits 10 ms: it does not spin
    owed[0].answer();
}

TEST(hostile, a_reset_while_its_answer_is_owed) { gone_while_owed(false, false); }
TEST(hostile, a_reset_while_its_answer_is_owed_with_poll) { gone_while_owed(true, false); }
TEST(hostile, a_reset_behind_input_that_waits) { gone_while_owed(false, true); }
TEST(hostile, a_reset_behind_input_that_waits_with_poll) { gone_while_owed(true, true); }

// Who has only closed its side still wants the answer.
TEST(hostile, a_half_closed_client_waits_for_its_answer) {
    map_type map;
    hooked server(map);
    smtpd::deferred_reply owed;
    server.hook = [&](const message_options& kwargs) {
        owed = kwargs.defer();
        return std::nullopt;
    };
    wire client = wire::tcp("127.0.0.1", server.port());
    client.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n");
    ::shutdown(client.fd(), SHUT_WR);
    const auto end = asyncore::clock::now() + 1300ms;
    while (asyncore::clock::now() < end) asyncore::poll(0.1, &map);
    CHECK_EQ(map.size(), 2u);
    owed.answer("250 at last");
    run_until(map, [&] { return map.size() == 1; });
    CHECK(client.take().find("250 at last\r\n") != std::string::npos);
}

// Deviation 20
TEST(hostile, a_message_that_drips) {
    smtpd::options with;
    with.idle_timeout = 10s;
    with.data_timeout = 50ms;
    session it(with);
    it.helo_to_data();
    const auto start = asyncore::clock::now();
    while (it.server.channel->connected && asyncore::clock::now() < start + 10s) {
        it.end().send("x");
        asyncore::poll(0.001, &it.map);
        if (it.server.channel->deadline() == asyncore::at_once) break;
        it.end().receive_all();
        if (it.end().received.find("421") != std::string::npos) break;
    }
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "421 Error: timeout exceeded\r\n");
    CHECK(asyncore::clock::now() - start < 5s);
}

// 64 KiB in that time is enough, however long it takes in all; so is a message that is too large.
TEST(hostile, a_slow_message_is_not_cut) {
    for (const std::size_t limit : {std::size_t(0), std::size_t(100000)}) {
        smtpd::options with;
        with.data_timeout = 300ms;
        with.data_size_limit = limit;
        session it(with);
        it.helo_to_data();
        const std::string half(40000, 'x');
        const auto start = asyncore::clock::now();
        while (asyncore::clock::now() < start + 700ms) {
            it.end().send(half);
            asyncore::poll(0.01, &it.map);
        }
        it.line("\r\n.", limit ? "552 Error: Too much mail data" : "250 OK");
    }
}

TEST(hostile, more_clients_than_are_wanted) {
    smtpd::options with;
    with.connection_limit = 2;
    map_type map;
    recorder server(map, with);
    wire one = wire::to(server), two = wire::to(server), three = wire::to(server);
    for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &map);
    three.receive_all();
    CHECK_EQ(three.take(), "421 Error: too many connections\r\n");
    CHECK(three.eof);
    two.send("QUIT\r\n");
    support::wait_for_eof(map, two);
    wire four = wire::to(server);
    asyncore::poll(0.0, &map);
    four.receive_all();
    CHECK_EQ(four.take().substr(0, 4), "220 ");
}

// ---------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------

// A limit is no promise that there is so much memory.
TEST(hostile, room_for_a_message_is_a_wish) {
    if (test::sanitized) SKIP("a limit of the address space is nothing for a sanitizer");
    const std::string line(997, 'x');
    for (const std::size_t limit : {std::size_t(99999999999), std::size_t(0), smtpd::DATA_SIZE_DEFAULT}) {
        smtpd::options with;
        with.data_size_limit = limit;
        session it(with);
        it.line("EHLO a",
                "250-\r\n" + (limit ? "250-SIZE " + std::to_string(limit) + "\r\n" : "") + "250-8BITMIME\r\n250 HELP");
        it.lines({{"MAIL FROM:<a@b> SIZE=" + std::to_string(limit ? limit : 99999999999), "250 OK"},
                  {"RCPT TO:<c@d>", "250 OK"},
                  {"DATA", "354 End data with <CR><LF>.<CR><LF>"}});
        rlimit before;
        ::getrlimit(RLIMIT_AS, &before);
        long pages = 0;
        if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
            if (std::fscanf(file, "%ld", &pages) != 1) pages = 0;
            std::fclose(file);
        }
        rlimit tight = before;
        if (pages > 0)
            tight.rlim_cur = static_cast<rlim_t>(pages) * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE)) + (24 << 20);
        ::setrlimit(RLIMIT_AS, &tight);
        for (int i = 0; i < 5000; ++i) {
            it.end().send(line + "\r\n");
            if (i % 50 == 0) asyncore::poll(0.0, &it.map);
        }
        it.line(".", "250 OK");
        ::setrlimit(RLIMIT_AS, &before);
        CHECK_EQ(it.server.messages.at(0).data.size(), 5000u * 998 - 1);
    }
}

// Deviation 54
TEST(hostile, an_idle_client_holds_no_message) {
    session it;
    it.helo_to_data();
    it.line(std::string(100000, 'x') + "\r\n.", "250 OK");
    CHECK(it.channel().received_data.capacity() <= 65536);
    it.mail_to_data();
    it.line("small\r\n.", "250 OK");
    CHECK_EQ(it.channel().received_data, "small");   // as in Python
    it.line("RSET", "250 OK");
    CHECK_EQ(it.channel().received_data, "");
}

// ---------------------------------------------------------------------------------------------------------
// A program that is built on it
// ---------------------------------------------------------------------------------------------------------

// The server may go at any moment of the first reply.
TEST(hostile, the_server_is_destroyed_in_the_banner) {
    struct destroying : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        std::unique_ptr<serving<destroying>>* owner = nullptr;
        int moment = 0;
        void now(int which) {
            if (owner && moment == which) owner->reset();
        }
        void start() override {
            now(0);
            SMTPChannel::start();
            now(1);
            if (moment == 4) owner->reset(), throw std::runtime_error("and now this");
        }
        void push(std::string_view text) override {
            now(2);
            SMTPChannel::push(text);
        }
        std::size_t send(std::string_view data) override {
            now(3);
            return SMTPChannel::send(data);
        }
    };
    for (int moment = 0; moment < 5; ++moment) {
        map_type map;
        auto server = std::make_unique<serving<destroying>>(map);
        server->prepare = [&](destroying& it) { it.owner = &server, it.moment = moment; };
        wire one = wire::tcp("127.0.0.1", server->port()), two = wire::tcp("127.0.0.1", server->port());
        support::captured out(std::cout);
        run_until(map, [&] { return map.empty(); });
        CHECK(!server);
    }
}

// Deviation 8
TEST(hostile, a_command_that_throws) {
    struct throwing : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        std::string where;
        void at(const std::string& place) const {
            if (where == place) throw std::runtime_error("at " + place);
        }
        command find_command(std::string_view verb) override {
            at("find_command");
            return SMTPChannel::find_command(verb);
        }
        void smtp_NOOP(argument arg) override {
            at("smtp_NOOP");
            SMTPChannel::smtp_NOOP(arg);
            at("after smtp_NOOP");
        }
        void smtp_RCPT(argument arg) override {
            at("smtp_RCPT");
            SMTPChannel::smtp_RCPT(arg);
        }
        void smtp_VRFY(argument) override {
            rcpttos.push_back("half@done");
            mailfrom = "half";
            at("smtp_VRFY");
        }
        void smtp_EXPN(argument) override {
            auto reply = defer();
            at("smtp_EXPN");
            reply.answer("252 perhaps");
        }
        std::string refuse_MAIL(const std::string&) override { return at("refuse_MAIL"), ""; }
        std::string refuse_RCPT(const std::string&) override { return at("refuse_RCPT"), ""; }
        std::vector<std::string> extensions() const override { return at("extensions"), std::vector<std::string>(); }
    };
    talking<throwing> it;
    support::captured out(std::cout);
    const auto fails = [&](const std::string& where, const std::string& line) {
        it.channel().where = where;
        it.line(line, COMMAND_NOT_PROCESSED);
        CHECK(out.text().find("at " + where + ")") != std::string::npos);
        it.channel().where.clear();
    };
    fails("extensions", "EHLO a");
    it.line("EHLO a", "250-mx.test\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250 HELP");
    fails("find_command", "NOOP");
    fails("smtp_NOOP", "NOOP");
    fails("smtp_VRFY", "VRFY x");
    CHECK(it.channel().mailfrom.empty() && it.channel().rcpttos.empty());
    fails("smtp_EXPN", "EXPN x");
    it.line("EXPN x", "252 perhaps");
    fails("refuse_MAIL", "MAIL FROM:<a@b>");
    it.line("MAIL FROM:<a@b>", "250 OK");
    fails("refuse_RCPT", "RCPT TO:<c@d>");
    fails("smtp_RCPT", "RCPT TO:<c@d>");
    it.line("DATA", "503 Error: need RCPT command");
    it.line("RCPT TO:<c@d>", "250 OK");
    it.line("NOOP", "250 OK");
    // What has been answered cannot be taken back: it is closed, as in Python.
    it.channel().where = "after smtp_NOOP";
    it.client->send("NOOP\r\n");
    CHECK_EQ(support::wait_for_eof(it.map, it.client->end_of_it()), "250 OK\r\n");
}

// Deviation 8
TEST(hostile, a_command_leaves_the_loop) {
    struct leaving : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        void smtp_HELP(argument) override { throw asyncore::ExitNow(); }
    };
    talking<leaving> it;
    it.client->end_of_it().send("HELP\r\nNOOP\r\n");
    CHECK_THROWS(run_until(it.map, [] { return false; }), asyncore::ExitNow);
    it.client->hear("");
    for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &it.map);
    it.client->hear(NOT_PROCESSED + "\r\n250 OK\r\n");
}

// What a command owes stands when it has begun to answer, and then leaves the loop.
TEST(hostile, a_command_that_owes_leaves_the_loop) {
    struct leaving : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        std::function<void(const smtpd::deferred_reply&)> with;
        void smtp_HELP(argument) override {
            push("250-first");
            with(defer());
            throw asyncore::ExitNow();
        }
    };
    smtpd::deferred_reply kept;
    const std::pair<std::function<void(const smtpd::deferred_reply&)>, std::string> rows[] = {
        {[](const auto&) {}, NOT_PROCESSED},
        {[](const auto& reply) { reply.answer("250 second"); }, "250 second"},
        {[&](const auto& reply) { kept = reply; }, "250 later"}};
    for (const auto& [with, last] : rows) {
        talking<leaving> it;
        it.channel().with = with;
        it.client->end_of_it().send("HELP\r\nNOOP\r\n");
        CHECK_THROWS(run_until(it.map, [] { return false; }), asyncore::ExitNow);
        kept.answer("250 later");
        for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &it.map);
        it.client->hear("250-first\r\n" + last + "\r\n250 OK\r\n");
    }
}

// A channel that is asked to owe once more waits for that answer, and the one before it reaches nobody, ever.
TEST(hostile, two_answers_are_owed) {
    struct owing : SMTPChannel {
        using SMTPChannel::SMTPChannel;
    };
    for (const bool gone : {false, true}) {
        talking<owing> it;
        const auto first = it.channel().defer(), second = it.channel().defer();
        second.answer("250 second");
        it.client->hear("250 second\r\n");
        if (gone) it.channel().close();
        asyncore::poll(0.0, &it.map);
        first.answer("250 first");
        if (!gone) it.line("NOOP", "250 OK");
    }
}

// Nor is a server needed any more by what a hook returns to.
TEST(hostile, the_server_is_destroyed_in_a_hook) {
    struct destroying : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        std::unique_ptr<serving<destroying>>* owner = nullptr;
        bool late = false;
        void collect_incoming_data(std::string_view data) override {
            if (smtp_state == DATA && !late) owner->reset();
            SMTPChannel::collect_incoming_data(data);
        }
        void found_terminator() override {
            if (smtp_state == DATA) owner->reset();
            SMTPChannel::found_terminator();
        }
    };
    for (const bool late : {false, true}) {
        for (const std::size_t size : {1u, 100000u}) {
            map_type map;
            auto server = std::make_unique<serving<destroying>>(map);
            server->prepare = [&](destroying& it) {
                it.owner = &server, it.late = late, it.ac_in_buffer_size = 200000;
            };
            wire client = wire::to(*server);
            client.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n");
            run_until(map, [&] { return client.take().find("354") != std::string::npos; });
            client.send(std::string(size, 'x') + "\r\n.\r\n");
            run_until(map, [&] { return map.empty(); });
            CHECK(!server);
        }
    }
}

// What a hook has closed asks no next server.
TEST(hostile, a_hook_closes_the_channel_of_a_proxy) {
    struct parting : smtpd::ProxyChannel {
        using ProxyChannel::ProxyChannel;
        std::function<void()> in_MAIL, in_RCPT;
        std::string refuse_MAIL(const std::string&) override { return in_MAIL(), ""; }
        std::string refuse_RCPT(const std::string&) override { return in_RCPT(), ""; }
    };
    struct proxy : smtpd::PureProxy {
        using PureProxy::PureProxy;
        parting* made = nullptr;
        std::unique_ptr<SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                   const asyncore::address& from) override {
            auto channel = std::make_unique<parting>(*this, std::move(conn), from);
            made = channel.get();
            return channel;
        }
    };
    for (const bool at_MAIL : {true, false}) {
        map_type map;
        recorder next(map);
        smtpd::options with;
        with.map = &map;
        auto server = std::make_unique<proxy>(asyncore::address("127.0.0.1", 0), next.socket->getsockname(), with);
        wire client = wire::to(*server);
        (at_MAIL ? server->made->in_MAIL : server->made->in_RCPT) = [&] { server.reset(); };
        (at_MAIL ? server->made->in_RCPT : server->made->in_MAIL) = [] {};
        client.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n");
        run_until(map, [&] { return client.receive_all(), client.eof; });
        CHECK(!server);
    }
}

// Deviation 23
TEST(hostile, a_client_that_cannot_be_served_costs_nobody_else) {
    struct choosy : recorder {
        using recorder::recorder;
        int count = 0;
        void handle_accepted(std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& from) override {
            if (++count == 1) throw std::runtime_error("not this one");
            recorder::handle_accepted(std::move(conn), from);
        }
    };
    map_type map;
    choosy server(map);
    support::captured out(std::cout);
    wire one = wire::tcp("127.0.0.1", server.port()), two = wire::tcp("127.0.0.1", server.port());
    run_until(map, [&] { return map.size() == 2; });
    CHECK(server.accepting);
    CHECK(out.text().find("not this one") != std::string::npos);
    one.receive_all();
    CHECK(one.eof);
}

// Deviation 55
TEST(hostile, replies_that_are_none) {
    struct refusing : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        std::string refusal;
        std::string refuse_MAIL(const std::string&) override { return refusal; }
        std::string refuse_RCPT(const std::string&) override { return refusal; }
    };
    talking<refusing> it;
    support::captured out(std::cout);
    it.line("HELO a", "250 mx.test");
    for (const std::string bad : {"no such user", "250 OK", "550 a\r\n250 b", "550 a\r\n", "550-a", "55", "550x",
                                  "550 a\nb", "354 go", "650 x", "550-a\r\n551 b"}) {
        it.channel().refusal = bad;
        it.line("MAIL FROM:<a@b>", COMMAND_NOT_PROCESSED);
    }
    CHECK(out.text().find("error: not a refusal: '550 a\\r\\n250 b'\n") != std::string::npos);
    for (const std::string good : {"550 no such user", "451", "550-a\r\n550 b", "421 "}) {
        it.channel().refusal = good;
        it.line("MAIL FROM:<a@b>", good);
    }
    it.channel().refusal.clear();
    for (const std::string bad : {"no", "25", "250-x", "999 x", "250 a\r\n\r\n"}) {
        it.server.status = bad;
        it.client->lines({{"MAIL FROM:<a@b>", "250 OK"},
                          {"RCPT TO:<c@d>", "250 OK"},
                          {"DATA", "354 End data with <CR><LF>.<CR><LF>"},
                          {"x\r\n.", NOT_PROCESSED}});
    }
    CHECK(out.text().find("error: not a reply: '250 a\\r\\n\\r\\n'\n") != std::string::npos);
}

// Deviation 56
TEST(hostile, a_small_limit_is_that_verbs_alone) {
    talking<SMTPChannel> it;
    it.line("EHLO a", "250-mx.test\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250 HELP");
    it.channel().command_size_limits.clear();
    it.channel().command_size_limits["NOOP"] = 8;
    it.line("VRFY " + std::string(300, 'a'), "252 Cannot VRFY user, but will accept message and attempt delivery");
    it.line("NOOP    ", "250 OK");
    it.line("NOOP     ", "500 Error: line too long");
}

// Deviation 61
// What comes in a state of a subclass is its own affair: not counted, not dropped, not held against the next command.
TEST(hostile, a_state_of_a_subclass) {
    struct answering : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        std::size_t size = 0;
        command find_command(std::string_view verb) override {
            return verb == "ASK" ? static_cast<command>(&answering::smtp_ASK) : SMTPChannel::find_command(verb);
        }
        void smtp_ASK(argument) { push("334 "), smtp_state = 2; }
        void found_terminator() override {
            if (smtp_state != 2) return SMTPChannel::found_terminator();
            smtp_state = COMMAND;
            size = std::exchange(received_lines, {}).size();
            push("235 thanks");
        }
    };
    talking<answering> it;
    it.line("ASK", "334 ");
    it.line(std::string(12288, 'x'), "235 thanks");
    CHECK_EQ(it.channel().size, 12288u);
    CHECK_EQ(it.channel().num_bytes, 0u);
    it.line("NOOP", "250 OK");
}

// The replies of one event go in one send().
// Deviation 57
TEST(hostile, one_send_for_one_event) {
    struct counting : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        int sends = 0;
        std::size_t send(std::string_view data) override { return ++sends, SMTPChannel::send(data); }
    };
    talking<counting> it;
    it.channel().sends = 0;
    it.client->send("NOOP\r\nNOOP\r\nNOOP\r\n");
    it.client->hear("250 OK\r\n250 OK\r\n250 OK\r\n");
    CHECK_EQ(it.channel().sends, 1);
}

// The first exception is the one that counts.
TEST(hostile, send_throws_after_a_command_has_thrown) {
    struct failing : SMTPChannel {
        using SMTPChannel::SMTPChannel;
        bool fails = false;
        std::size_t send(std::string_view data) override {
            if (fails) throw std::runtime_error("second");
            return SMTPChannel::send(data);
        }
        void smtp_NOOP(argument) override {
            push("250 OK");
            fails = true;
            throw std::logic_error("first");
        }
    };
    talking<failing> it;
    support::captured out(std::cout);
    it.client->send("NOOP\r\n");
    CHECK(out.text().find("(std::logic_error:first)") != std::string::npos);
    run_until(it.map, [&] { return it.map.size() == 1; });
}

// conn is the socket that there is.
TEST(hostile, conn_follows_set_socket) {
    talking<SMTPChannel> it;
    auto [end, sock] = wire::pair();
    auto* const other = sock.get();
    it.channel().set_socket(std::move(sock));
    CHECK(it.channel().conn == other);
    it.channel().push("250 over here");
    CHECK_EQ(end.take(), "250 over here\r\n");
}

// A close that fails, for lack of memory say, is tried in a plainer way.
TEST(hostile, handle_close_fails) {
    struct failing : asyncore::dispatcher {
        using dispatcher::dispatcher;
        void handle_read() override { throw std::runtime_error("read"); }
        void handle_close() override { throw std::bad_alloc(); }
        bool writable() override { return false; }
    };
    map_type map;
    auto [end, sock] = wire::pair();
    failing it(std::move(sock), &map);
    end.send("x");
    support::captured out(std::cout);
    asyncore::poll(5.0, &map);
    CHECK(map.empty());
}
