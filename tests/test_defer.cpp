// Replies that come later: defer(), and what becomes of it. And SMTPServer::stop().

#include "dialog.hpp"
#include "test.hpp"

using smtpd::deferred_reply;
using smtpd::message_options;
using support::captured;
using support::session;
using support::wire;
using namespace std::chrono_literals;

namespace {

const std::string DATA_START = "354 End data with <CR><LF>.<CR><LF>\r\n";
const std::string NOT_PROCESSED = "451 Error: message not processed";
const std::string TRANSACTION = "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n";
const std::string ACCEPTED = "250 OK\r\n250 OK\r\n" + DATA_START;
const std::string SHUTTING_DOWN = "421 Error: server is shutting down";

// A session whose messages wait for their answers.
struct waiting : session {
    std::vector<deferred_reply> replies;   // one for each message, in their order

    explicit waiting(const smtpd::options& with = {}) : session(with) {
        server.hook = [this](const message_options& kwargs) {
            replies.push_back(kwargs.defer());
            return std::nullopt;
        };
    }
    // Up to the message, whose answer is owed then.
    void begin() {
        if (channel().seen_greeting.empty()) line("HELO a", "250 ");
        mail_to_data();
        line("x\r\n.", "");
    }
    // The message and what the client hears about it, when the hook does this.
    void message(const decltype(server.hook)& what, const std::string& answer) {
        server.hook = what;
        if (channel().seen_greeting.empty()) line("HELO a", "250 ");
        mail_to_data();
        line("x\r\n.", answer);
    }
    void still_there() {
        line("NOOP", "250 OK");
        client.end();
    }
};

std::optional<std::string> nothing() { return std::nullopt; }

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// What the hook is given
// ---------------------------------------------------------------------------------------------------------

TEST(hook, the_data_is_the_channels_own) {
    struct taking : support::nameless<support::recorder> {
        std::vector<std::string> kept;
        bool take = false, same = false;
        using nameless::nameless;
        std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                                   const std::vector<std::string>&, std::string&& data,
                                                   const message_options&) override {
            same = &data == &channel->received_data;
            if (take) kept.push_back(std::move(data));
            return std::nullopt;
        }
    };
    asyncore::map_type map;
    taking server(map);
    auto end = wire::to(server);
    const std::string text(1000, 'x');
    end.send("HELO a\r\n" + TRANSACTION + text + "\r\n.\r\n");
    support::run_until(map, [&] { return server.same; });
    CHECK_EQ(server.channel->received_data, text);   // left alone, it can still be read
    server.take = true;
    end.send(TRANSACTION + text + "\r\n.\r\n");
    support::run_until(map, [&] { return !server.kept.empty(); });
    CHECK_EQ(server.kept.at(0), text);
    CHECK_EQ(server.channel->received_data, "");   // moved from, not copied
}

TEST(hook, the_options_are_those_of_the_last_commands) {
    session it;
    it.line("EHLO a", "250-\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250 HELP");
    it.lines({{"MAIL FROM:<a@b> size=10 body=8bitmime", "250 OK"}, {"RCPT TO:<c@d>", "250 OK"}});
    it.channel().rcpt_options = {"NOTIFY=NEVER"};   // as a subclass with more parameters would have it
    it.lines({{"DATA", DATA_START.substr(0, DATA_START.size() - 2)}, {"x\r\n.", "250 OK"}});
    CHECK_EQ(support::list(it.server.messages.at(0).mail_options), "['SIZE=10', 'BODY=8BITMIME']");
    CHECK_EQ(support::list(it.server.messages.at(0).rcpt_options), "['NOTIFY=NEVER']");
    it.mail_to_data();
    it.line("x\r\n.", "250 OK");
    CHECK_EQ(support::list(it.server.messages.at(1).mail_options), "[]");
    CHECK_EQ(support::list(it.server.messages.at(1).rcpt_options), "[]");
    it.client.end();
}

// ---------------------------------------------------------------------------------------------------------
// Answered before the hook returns
// ---------------------------------------------------------------------------------------------------------

TEST(defer, answered_before_the_hook_returns) {
    waiting it;
    it.message(
        [](const message_options& kwargs) {
            kwargs.defer().answer("550 no");
            return nothing();
        },
        "550 no");
    it.message(
        [](const message_options& kwargs) {
            kwargs.defer().answer();
            return nothing();
        },
        "250 OK");
    it.still_there();
}

TEST(defer, a_text_that_is_returned_as_well_is_ignored) {
    waiting it;
    it.message(
        [](const message_options& kwargs) -> std::optional<std::string> {
            kwargs.defer().answer("250 the token's");
            return "550 the hook's";
        },
        "250 the token's");
    it.message(
        [&](const message_options& kwargs) -> std::optional<std::string> {
            it.replies.push_back(kwargs.defer());
            return "550 the hook's";
        },
        "");
    it.replies.back().answer("250 the token's, later");
    it.client.hear("250 the token's, later\r\n");
    it.still_there();
}

TEST(defer, the_hook_throws_afterwards) {
    waiting it;
    captured out(std::cout);
    it.message(
        [](const message_options& kwargs) -> std::optional<std::string> {
            kwargs.defer().answer("250 OK");
            throw std::runtime_error("after the answer");
        },
        NOT_PROCESSED);
    it.message(
        [&](const message_options& kwargs) -> std::optional<std::string> {
            it.replies.push_back(kwargs.defer());
            throw std::runtime_error("before the answer");
        },
        NOT_PROCESSED);
    it.replies.back().answer("250 OK");   // too late
    it.replies.clear();
    it.client.hear("");
    it.message(
        [](const message_options& kwargs) -> std::optional<std::string> {
            kwargs.defer();   // dropped at once
            throw std::runtime_error("nobody answers");
        },
        NOT_PROCESSED);
    it.still_there();
}

TEST(defer, dropped_in_the_hook) {
    waiting it;
    it.message(
        [](const message_options& kwargs) -> std::optional<std::string> {
            kwargs.defer();
            return "250 OK";
        },
        NOT_PROCESSED);
    it.still_there();
}

TEST(defer, not_called_at_all) {
    waiting it;
    it.message([](const message_options&) { return std::optional<std::string>("250 as ever"); }, "250 as ever");
    it.message([](const message_options&) { return std::optional<std::string>(""); }, "250 OK");
    it.still_there();
}

// ---------------------------------------------------------------------------------------------------------
// Answered later
// ---------------------------------------------------------------------------------------------------------

TEST(defer, answered_later) {
    waiting it;
    it.begin();
    CHECK(it.channel().paused());
    CHECK(!it.channel().readable());
    CHECK(it.channel().deadline() <= asyncore::clock::now() + 2s);   // when it looks whether the client is still there
    it.replies.at(0).answer("250 done");
    it.client.hear("250 done\r\n");
    it.begin();
    it.replies.at(1).answer();
    it.client.hear("250 OK\r\n");
    it.begin();
    it.replies.at(2).answer("250 \u00e7a y est");
    it.client.hear("250 \u00e7a y est\r\n");
    // The transaction is over, the session is not.
    it.line("DATA", "503 Error: need RCPT command");
    CHECK_EQ(it.server.messages.size(), 3u);
    it.still_there();
}

TEST(defer, twice_is_the_same_answer) {
    waiting it;
    it.server.hook = [&](const message_options& kwargs) {
        it.replies = {kwargs.defer(), kwargs.defer()};
        return nothing();
    };
    it.begin();
    it.replies.erase(it.replies.begin());   // one holder less: still owed
    it.client.hear("");
    it.replies.at(0).answer("250 once");
    it.client.hear("250 once\r\n");

    it.begin();
    it.replies.at(0).answer("250 first");
    it.replies.at(1).answer("550 second");
    it.replies.clear();
    it.client.hear("250 first\r\n");
    it.still_there();
}

TEST(defer, answered_twice) {
    waiting it;
    it.message(
        [](const message_options& kwargs) {
            const auto reply = kwargs.defer();
            reply.answer("250 first");
            reply.answer("550 second");
            return nothing();
        },
        "250 first");
    it.server.hook = [&](const message_options& kwargs) {
        it.replies = {kwargs.defer()};
        return nothing();
    };
    it.begin();
    it.replies[0].answer("250 first");
    it.replies[0].answer("550 second");
    it.client.hear("250 first\r\n");
    // Nor does an old token answer the next message.
    const auto old = it.replies[0];
    it.begin();
    old.answer("550 third");
    it.client.hear("");
    it.replies[0].answer("250 its own");
    it.client.hear("250 its own\r\n");
    it.still_there();
}

TEST(defer, copies_are_one_answer_and_the_last_one_counts) {
    waiting it;
    it.begin();
    auto copy = it.replies[0];
    auto moved = std::move(it.replies[0]);
    it.replies.clear();
    copy = deferred_reply();
    it.client.hear("");
    moved = deferred_reply();
    it.client.hear(NOT_PROCESSED + "\r\n");
    it.still_there();
}

TEST(defer, dropped_unanswered) {
    waiting it;
    it.begin();
    it.client.hear("");
    it.replies.clear();
    it.client.hear(NOT_PROCESSED + "\r\n");
    it.still_there();
}

// No crash: there is nothing else to see.
TEST(defer, a_token_of_nobody) {
    deferred_reply nobody;
    nobody.answer("250 OK");
    const message_options made_up;
    made_up.defer().answer("250 OK");
}

TEST(defer, kwargs_that_are_kept) {
    waiting it;
    std::optional<message_options> kept;
    // Without defer() in the hook, a copy has nothing to say.
    it.message(
        [&](const message_options& kwargs) {
            kept = kwargs;
            return nothing();
        },
        "250 OK");
    kept->defer().answer("550 too late");
    it.client.hear("");
    // With it, what the copy gives is the same answer, or none: never two.
    it.message(
        [&](const message_options& kwargs) {
            kept = kwargs;
            it.replies = {kept->defer()};
            return nothing();
        },
        "");
    it.replies[0].answer("250 once");
    kept->defer().answer("550 too late");
    it.client.hear("250 once\r\n");
    // A copy that is kept is no holder.
    it.message(
        [&](const message_options& kwargs) {
            kept = kwargs;
            it.replies = {kwargs.defer()};
            return nothing();
        },
        "");
    it.replies.clear();
    it.client.hear(NOT_PROCESSED + "\r\n");
    kept->defer().answer("550 too late");
    it.still_there();
    kept->defer().answer("550 much too late");
}

// ---------------------------------------------------------------------------------------------------------
// Somebody has gone meanwhile
// ---------------------------------------------------------------------------------------------------------

TEST(defer, the_client_has_gone) {
    for (const bool dropped : {false, true}) {
        waiting it;
        it.begin();
        it.end().close();
        for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &it.map);
        dropped ? it.replies.clear() : it.replies.at(0).answer("250 OK");
        support::run_until(it.map, [&] { return it.map.size() == 1; });   // the channel has found out
        CHECK_EQ(it.server.messages.size(), 1u);
    }
}

TEST(defer, the_channel_was_closed) {
    for (const bool dropped : {false, true}) {
        waiting it;
        it.begin();
        it.channel().close();
        asyncore::poll(0.0, &it.map);
        CHECK_EQ(it.map.size(), 1u);
        dropped ? it.replies.clear() : it.replies.at(0).answer("250 OK");
        CHECK_EQ(support::wait_for_eof(it.map, it.end()), "");
    }
}

TEST(defer, the_channel_is_closed_in_the_hook) {
    for (const int way : {0, 1, 2}) {
        waiting it;
        it.server.hook = [&](const message_options& kwargs) -> std::optional<std::string> {
            if (way > 0) it.replies.push_back(kwargs.defer());
            if (way > 1) it.replies.back().answer("250 OK");
            it.channel().close();
            return nothing();
        };
        it.end().send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\nNOOP\r\n");
        CHECK_EQ(support::wait_for_eof(it.map, it.end()), "250 \r\n" + ACCEPTED);
        it.replies.clear();
    }
}

TEST(defer, the_server_has_gone) {
    for (const bool dropped : {false, true}) {
        asyncore::map_type map;
        std::vector<deferred_reply> replies;
        std::optional<wire> end;
        {
            support::nameless<support::hooked> server(map);
            server.hook = [&](const message_options& kwargs) {
                replies.push_back(kwargs.defer());
                return nothing();
            };
            end.emplace(wire::to(server));
            end->send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\n");
            support::run_until(map, [&] { return !replies.empty(); });
        }
        CHECK(map.empty());
        dropped ? replies.clear() : replies.at(0).answer("250 OK");
        end->receive_all();
        CHECK(end->eof);
        CHECK_EQ(end->take(), support::banner("") + "250 \r\n" + ACCEPTED);
    }
}

// The tokens are the server's own members: they go first.
TEST(defer, the_server_takes_its_tokens_along) {
    struct keeper : support::recorder {
        std::vector<deferred_reply> replies;
        using recorder::recorder;
        std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                                   const std::vector<std::string>&, std::string&&,
                                                   const message_options& kwargs) override {
            replies.push_back(kwargs.defer());
            return std::nullopt;
        }
    };
    asyncore::map_type map;
    std::optional<wire> end;
    {
        keeper server(map);
        end.emplace(wire::to(server));
        end->send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\n");
        support::run_until(map, [&] { return !server.replies.empty(); });
    }
    end->receive_all();
    CHECK(end->eof);
    CHECK(map.empty());
}

// No crash: there is nothing else to see.
TEST(defer, the_map_has_gone) {
    std::vector<deferred_reply> replies;
    {
        waiting it;
        it.begin();
        replies = std::move(it.replies);
    }
    replies.at(0).answer("250 OK");
}

TEST(defer, the_map_is_cleared) {
    waiting it;
    it.begin();
    it.map.clear();
    it.replies.at(0).answer("250 OK");   // nobody is there
    it.end().receive_all();
    CHECK(it.end().eof);
}

namespace {

// Its channels can be made to throw when they answer, and when they close.
struct faulty : support::hooked {
    struct channel : smtpd::SMTPChannel {
        bool push_fails = false, close_fails = false;
        using SMTPChannel::SMTPChannel;
        void push(std::string_view msg) override {
            if (push_fails) throw std::runtime_error("push");
            SMTPChannel::push(msg);
        }
        void close() override {
            SMTPChannel::close();
            if (close_fails) throw std::runtime_error("close");
        }
    };
    channel* last = nullptr;
    bool stuck = false;

    using hooked::hooked;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        auto made = std::make_unique<channel>(*this, std::move(sock), from, settings);
        last = made.get();
        return made;
    }
    void close() override {
        hooked::close();
        if (stuck) throw std::system_error(EIO, std::generic_category(), "close");
    }
};

}   // namespace

// It is closed, rather than left waiting for ever.
TEST(defer, a_client_that_cannot_be_answered) {
    for (const bool close_fails : {false, true}) {
        asyncore::map_type map;
        faulty server(map);
        deferred_reply reply;
        server.hook = [&](const message_options& kwargs) {
            reply = kwargs.defer();
            return nothing();
        };
        wire end = wire::to(server);
        end.send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\n");
        support::run_until(map, [&] { return server.messages.size() == 1; });
        server.last->push_fails = true;
        server.last->close_fails = close_fails;
        reply.answer("250 OK");
        CHECK_EQ(map.size(), 1u);
        end.receive_all();
        CHECK(end.eof);
    }
}

TEST(defer, the_server_goes_and_its_channels_cannot_close) {
    asyncore::map_type map;
    std::optional<wire> end;
    {
        faulty server(map);
        end.emplace(wire::to(server));
        server.last->close_fails = true;
    }
    CHECK(map.empty());
    end->receive_all();
    CHECK(end->eof);
}

// ---------------------------------------------------------------------------------------------------------
// What the client says meanwhile
// ---------------------------------------------------------------------------------------------------------

static void pipelined_input_waits(bool use_poll) {
    waiting it;
    it.end().send("HELO a\r\n" + TRANSACTION + "one\r\n.\r\nNOOP\r\n" + TRANSACTION +
                  "two\r\n.\r\nVRFY x\r\nQUIT\r\nNOOP\r\n");
    for (int i = 0; i < 5; ++i) use_poll ? asyncore::poll2(0.0, &it.map) : asyncore::poll(0.0, &it.map);
    CHECK_EQ(it.end().take(), "250 \r\n" + ACCEPTED);
    CHECK_EQ(it.server.messages.size(), 1u);
    it.replies.at(0).answer("250 one");
    CHECK_EQ(it.server.messages.size(), 1u);   // it goes on in the loop, not in here
    support::run_until(
        it.map, [&] { return it.replies.size() == 2; }, use_poll);
    CHECK_EQ(it.end().take(), "250 one\r\n250 OK\r\n" + ACCEPTED);
    it.replies.at(1).answer("250 two");
    CHECK_EQ(support::wait_for_eof(it.map, it.end(), use_poll),
             "250 two\r\n252 Cannot VRFY user, but will accept message and attempt delivery\r\n221 Bye\r\n");
    CHECK_EQ(it.server.messages.at(1).data, "two");
}

TEST(defer, pipelined_input_waits_in_order) { pipelined_input_waits(false); }
TEST(defer, pipelined_input_waits_in_order_with_poll) { pipelined_input_waits(true); }

TEST(defer, what_comes_while_it_waits_is_not_read) {
    waiting it;
    it.begin();
    it.end().send("NOOP\r\n" + std::string(100000, 'x'));
    for (int i = 0; i < 5; ++i) asyncore::poll(0.0, &it.map);
    CHECK_EQ(it.channel().ac_in_buffer().size(), 0u);
    CHECK_EQ(it.end().take(), "");
    it.replies.at(0).answer();
    CHECK_EQ(it.hear(), "250 OK\r\n250 OK\r\n");
    it.line("", "500 Error: line too long");
    it.client.end();
}

TEST(defer, half_of_a_message_waits_too) {
    waiting it;
    it.end().send("HELO a\r\n" + TRANSACTION + "one\r\n.\r\n" + TRANSACTION + "tw");
    support::run_until(it.map, [&] { return it.replies.size() == 1; });
    it.end().send("o\r\n.\r");
    it.replies.at(0).answer();
    CHECK_EQ(it.hear(), "250 \r\n" + ACCEPTED + "250 OK\r\n" + ACCEPTED);
    it.end().send("\n");
    support::run_until(it.map, [&] { return it.replies.size() == 2; });
    it.replies.at(1).answer();
    it.client.hear("250 OK\r\n");
    CHECK_EQ(it.server.messages.at(1).data, "two");
    it.client.end();
}

// The client has said everything, and closed its side, before it is answered.
static void half_closed(bool use_poll) {
    waiting it;
    it.end().send("HELO a\r\n" + TRANSACTION + "one\r\n.\r\n" + TRANSACTION + "two\r\n.\r\nQUIT\r\n");
    it.end().shutdown_write();
    for (int i = 0; i < 5; ++i) use_poll ? asyncore::poll2(0.0, &it.map) : asyncore::poll(0.0, &it.map);
    for (std::size_t i = 0; i < 2; ++i) {
        support::run_until(
            it.map, [&] { return it.replies.size() > i || it.map.size() == 1; }, use_poll);
        CHECK_EQ(it.replies.size(), i + 1);
        it.replies[i].answer("250 " + std::to_string(i));
    }
    CHECK_EQ(support::wait_for_eof(it.map, it.end(), use_poll),
             "250 \r\n" + ACCEPTED + "250 0\r\n" + ACCEPTED + "250 1\r\n221 Bye\r\n");
}

TEST(defer, a_client_that_has_closed_its_side) { half_closed(false); }
TEST(defer, a_client_that_has_closed_its_side_with_poll) { half_closed(true); }

TEST(defer, many_messages_one_after_the_other) {
    constexpr std::size_t count = 3000;
    waiting it;
    bool answering = false;
    it.server.hook = [&](const message_options& kwargs) {
        if (answering) throw std::logic_error("the next message came inside answer()");
        it.replies.push_back(kwargs.defer());
        return nothing();
    };
    std::string all = "HELO a\r\n", expected = "250 \r\n", heard;
    for (std::size_t i = 0; i < count; ++i) {
        all += TRANSACTION + "x\r\n.\r\n";
        expected += ACCEPTED + "250 OK\r\n";
    }
    std::string_view rest = all;
    std::size_t read_at_most = 0;
    const auto end = asyncore::clock::now() + 5s;
    while (heard.size() < expected.size() && asyncore::clock::now() < end) {
        rest.remove_prefix(it.end().send_some(rest));
        asyncore::poll(0.0, &it.map);
        read_at_most = std::max(read_at_most, it.channel().ac_in_buffer().size());
        answering = true;
        for (const auto& reply : it.replies) reply.answer();
        answering = false;
        it.replies.clear();
        heard += it.end().take();
    }
    CHECK(heard == expected);
    // However much the client sends ahead: one recv() is all that waits.
    CHECK(read_at_most <= it.channel().ac_in_buffer_size + 4);
    CHECK_EQ(it.server.messages.size(), count);
}

TEST(defer, a_loop_inside_the_hook_reads_nothing_more) {
    waiting it;
    std::string meanwhile = "not called";
    it.server.hook = [&](const message_options&) {
        for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &it.map);
        meanwhile = it.end().take();
        return std::optional<std::string>("250 from the hook");
    };
    it.end().send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\nNOOP\r\n");
    CHECK_EQ(it.hear().substr(0, 9), "250 from ");
    CHECK(meanwhile != "not called");
    CHECK_EQ(it.server.messages.size(), 1u);
    it.client.hear("");
    it.still_there();
}

TEST(defer, answered_inside_the_hook_of_another_client) {
    waiting it;
    it.begin();
    wire second = wire::to(it.server);
    it.server.hook = [&](const message_options&) {
        it.replies.at(0).answer("250 the first one's");
        return std::optional<std::string>("250 the second one's");
    };
    second.send("HELO b\r\n" + TRANSACTION + "y\r\n.\r\nQUIT\r\n");
    CHECK_EQ(support::wait_for_eof(it.map, second),
             support::banner("") + "250 \r\n" + ACCEPTED + "250 the second one's\r\n221 Bye\r\n");
    it.client.hear("250 the first one's\r\n");
    it.still_there();
}

TEST(defer, ExitNow_leaves_the_loop) {
    waiting it;
    it.server.hook = [](const message_options&) -> std::optional<std::string> { throw asyncore::ExitNow("enough"); };
    it.end().send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\n");
    CHECK_THROWS(support::run_until(it.map, [] { return false; }), asyncore::ExitNow);
    CHECK_EQ(it.end().take(), "250 \r\n" + ACCEPTED);   // and nothing about the message
    // The loop is entered again, and the client goes on.
    CHECK_EQ(it.say("RSET\r\n"), "451 Error: message not processed\r\n250 OK\r\n");
    it.still_there();
}

// The clock begins anew with the answer, however long it took.
TEST(defer, the_idle_clock_stands_still) {
    smtpd::options with;
    with.idle_timeout = 20ms;
    waiting it(with);
    it.begin();
    const auto end = asyncore::clock::now() + 30ms;
    while (asyncore::clock::now() < end) asyncore::poll(0.03, &it.map);
    it.client.hear("");
    it.replies.at(0).answer();
    CHECK(it.channel().deadline() > asyncore::clock::now() + 10ms);
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "250 OK\r\n421 Error: timeout exceeded\r\n");
}

// ---------------------------------------------------------------------------------------------------------
// stop()
// ---------------------------------------------------------------------------------------------------------

TEST(stop, those_who_have_nothing_in_hand_go_at_once) {
    waiting it;
    auto second = wire::to(it.server);
    it.lines({{"HELO a", "250 "}, {"MAIL FROM:<a@b>", "250 OK"}});
    it.server.stop(10s);
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), SHUTTING_DOWN + "\r\n");
    CHECK_EQ(support::wait_for_eof(it.map, second), support::banner("") + SHUTTING_DOWN + "\r\n");
    CHECK(it.map.empty());                   // loop() returns
    CHECK(it.server.socket->fileno() < 0);   // its port may be another program's by now
}

TEST(stop, what_is_said_after_it_is_not_executed) {
    waiting it;
    it.line("HELO a", "250 ");
    it.end().send("NOOP\r\nMAIL FROM:<a@b>\r\n");
    it.server.stop(10s);
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), SHUTTING_DOWN + "\r\n");
}

TEST(stop, a_message_that_is_being_sent_is_taken) {
    session it;
    it.helo_to_data();
    it.client.send("half");
    it.server.stop(10s);
    it.client.hear("");
    it.end().send(" a message\r\n.\r\nNOOP\r\n");
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "250 OK\r\n" + SHUTTING_DOWN + "\r\n");
    CHECK_EQ(it.server.messages.at(0).data, "half a message");
    CHECK(it.map.empty());
}

TEST(stop, a_message_that_is_owed_an_answer_gets_it) {
    waiting it;
    it.begin();
    it.server.stop(10s);
    it.client.hear("");
    it.replies.at(0).answer("250 done");
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "250 done\r\n" + SHUTTING_DOWN + "\r\n");
    CHECK(it.map.empty());
}

TEST(stop, in_the_hook) {
    for (const bool deferred : {false, true}) {
        waiting it;
        it.server.hook = [&](const message_options& kwargs) {
            it.server.stop(10s);
            if (deferred) it.replies.push_back(kwargs.defer());
            return nothing();
        };
        it.end().send("HELO a\r\n" + TRANSACTION + "x\r\n.\r\nNOOP\r\n");
        support::run_until(it.map, [&] { return it.server.messages.size() == 1; });
        if (deferred) it.replies.at(0).answer();
        CHECK_EQ(support::wait_for_eof(it.map, it.end()),
                 "250 \r\n" + ACCEPTED + "250 OK\r\n" + SHUTTING_DOWN + "\r\n");
        CHECK(it.map.empty());
    }
}

// The grace is over: those who have a message in hand go too.
TEST(stop, within_its_grace) {
    for (const int way : {0, 1, 2}) {
        waiting it;
        if (way == 0) {   // its data never ends
            it.helo_to_data();
        } else {   // its answer never comes
            it.begin();
        }
        if (way == 2) {   // and it has more to say
            it.end().send("NOOP\r\n");
        }
        it.server.stop(20ms);
        const auto before = asyncore::clock::now();
        const std::string heard = support::wait_for_eof(it.map, it.end());
        CHECK_EQ(heard, SHUTTING_DOWN + "\r\n");
        CHECK(asyncore::clock::now() - before >= 15ms);
        CHECK(it.map.empty());
        for (const auto& reply : it.replies) reply.answer();   // nobody hears it
    }
}

// It does not fetch what it is told: it goes with the grace.
TEST(stop, a_client_that_never_reads) {
    smtpd::options with;
    with.reply_queue_limit = 1000;
    waiting it(with);
    it.channel().socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
    std::string commands;
    for (int i = 0; i < 5000; ++i) commands += "HELP\r\n";
    it.end().send(commands);
    for (int i = 0; i < 5; ++i) asyncore::poll(0.0, &it.map);
    CHECK(it.channel().queued() > 0);
    it.server.stop(20ms);
    support::run_until(it.map, [&] { return it.map.empty(); });
}

TEST(stop, however_long_it_takes) {
    session it;
    it.helo_to_data();
    it.server.stop(std::chrono::milliseconds::max());
    for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &it.map);
    it.client.hear("");
    it.line("x\r\n.", "250 OK\r\n" + SHUTTING_DOWN);
}

TEST(stop, twice) {
    waiting it;
    it.begin();
    it.server.stop(10s);
    it.server.stop(20ms);
    CHECK_EQ(support::wait_for_eof(it.map, it.end()).substr(0, 4), "421 ");
    CHECK(it.map.empty());
}

TEST(stop, a_listener_that_does_not_close_properly) {
    asyncore::map_type map;
    faulty server(map);
    wire end = wire::to(server);
    server.stuck = true;
    server.stop(10s);
    CHECK_EQ(support::wait_for_eof(map, end), support::banner("mx.test") + SHUTTING_DOWN + "\r\n");
    CHECK(map.empty());
}

// Those who have not been accepted yet are not any more.
TEST(stop, while_clients_are_accepted) {
    struct brief : support::recorder {
        using recorder::recorder;
        std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                          const asyncore::address& from) override {
            stop(10s);
            return recorder::channel_class(std::move(sock), from);
        }
    };
    asyncore::map_type map;
    brief server(map);
    wire first = wire::tcp("127.0.0.1", server.port()), second = wire::tcp("127.0.0.1", server.port());
    captured out(std::cout);
    CHECK_EQ(support::wait_for(map, first, "\r\n"), support::banner("mx.test"));
    CHECK_EQ(support::wait_for_eof(map, second), "");
    CHECK_EQ(map.size(), 1u);   // the first one's channel
    CHECK_EQ(out.text(), "");   // and no complaint about a listener that is closed
}
