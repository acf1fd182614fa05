// What PureProxy makes of recipients, clients that leave, pipelines, line ends, options and subclasses.
// The faults of a single server at each stage are in test_proxy.cpp.

#include <sys/resource.h>
#include <time.h>

#include <algorithm>

#include "dialog.hpp"
#include "scene.hpp"

using namespace scenes;
using support::has_ipv6;

namespace {

const std::string NO = "550 5.1.1 never";
const std::string NOT_NOW = "450 4.2.1 not now";
const std::string body = "Subject: tagged-1\r\n\r\nHello";

std::string joined(const std::vector<std::string>& words) {
    std::string text;
    for (const auto& word : words) text += (text.empty() ? "" : " ") + word;
    return text;
}

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// Recipients
// ---------------------------------------------------------------------------------------------------------

// Deviations 33, 34
TEST(relay, recipients_get_their_own_answers) {
    struct row {
        std::string name;   // the recipients: yes, 251, 4xx, 5xx
    };
    std::vector<row> rows;
    const std::vector<std::string> kinds{"yes", "no", "later", "forward"};
    for (const auto& a : kinds)
        for (const auto& b : kinds)
            for (const auto& c : kinds) rows.push_back({a + " " + b + " " + c});
    each(rows, [](const row& it, bool use_poll) {
        scene here(use_poll);
        std::vector<std::string> to, good;
        std::string told = OK;
        for (std::size_t at = 0; at <= it.name.size();) {
            const std::size_t end = std::min(it.name.find(' ', at), it.name.size());
            const std::string kind = it.name.substr(at, end - at), name = kind + std::to_string(at) + "@example";
            at = end + 1;
            const std::string said = kind == "no"        ? NO
                                     : kind == "later"   ? NOT_NOW
                                     : kind == "forward" ? "251 will forward"
                                                         : "250 fine";
            here.up.always["RCPT TO:<" + name + ">"] = says(said);
            to.push_back(name);
            const bool yes = said[0] == '2';
            if (yes) good.push_back(name);
            told += " / " + (yes ? OK : said);
        }
        if (!good.empty()) told += " / 354 / " + TAKEN;
        CHECK_EQ(here.client.mail("<a@client.test>", to, body), told);
        CHECK_EQ(here.up.messages.size(), good.empty() ? 0u : 1u);
        if (good.empty())
            CHECK_EQ(here.client.ask("DATA"), std::string("503 Error: need RCPT command"));
        else
            CHECK_EQ(joined(here.up.messages[0].rcpttos), joined(good));
        here.finish();
        CHECK_EQ(here.up.heard.size(), 1u);
    });
}

TEST(relay, a_recipient_that_is_lost_loses_the_transaction) {
    struct row {
        std::string name;
        act what;
    };
    const std::vector<row> rows{{"silence", says_nothing()},
                                {"closes", hangs_up()},
                                {"resets", resets()},
                                {"421", says("421 4.3.2 bye")},
                                {"nonsense", sends("what\r\n")}};
    each(rows, [](const row& it, bool use_poll) {
        with_timeout([&](milliseconds wait) {
            smtpd::options with;
            with.upstream.command = wait;
            scene here(use_poll, with);
            here.up.script["RCPT TO:<lost@example>"] = {it.what};
            CHECK_EQ(here.client.mail("<a@client.test>", {"b@example", "lost@example", "c@example"}, body),
                     OK + " / " + OK + " / " + NOT_AVAILABLE + " / " + NOT_AVAILABLE + " / " + NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("RCPT TO:<d@example>"), NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("RSET"), OK);
            CHECK_EQ(here.client.ask("RCPT TO:<d@example>"), std::string("503 Error: need MAIL command"));
            CHECK_EQ(here.up.messages.size(), 0u);
            CHECK_EQ(here.client.mail("<a@client.test>", {"b@example", "c@example"}, body),
                     OK + " / " + OK + " / " + OK + " / 354 / " + TAKEN);
            CHECK_EQ(here.up.accepted("tagged-1"), 1u);
            CHECK_EQ(joined(here.up.messages[0].rcpttos), std::string("b@example c@example"));
            here.finish();
        });
    });
}

TEST(relay, an_upstream_that_leaves_between_two_commands) {
    for (const bool use_poll : {false, true}) {
        for (const std::string unasked : {"", "421 4.4.2 too slow\r\n", "250 ok\r\n"}) {
            scene here(use_poll);
            CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
            CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), OK);
            if (!unasked.empty()) here.up.say_unasked(unasked);
            here.settle();
            here.up.hang_up();
            here.settle();
            CHECK_EQ(here.client.ask("DATA"), NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("DATA"), NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), NOT_AVAILABLE);
            CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
            here.finish();
        }
    }
}

// The answer to DATA is ours; the message finds nobody.
TEST(relay, an_upstream_that_leaves_before_the_message) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        support::captured told(smtpd::DEBUGSTREAM);
        CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
        CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), OK);
        CHECK_EQ(here.client.ask("DATA").substr(0, 3), std::string("354"));
        here.up.hang_up();
        here.settle();
        here.client.say(body + "\r\n.\r\n");
        CHECK_EQ(here.client.answer(), NOT_AVAILABLE);
        here.up.script["RCPT"] = {says("421 4.3.2 bye")};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), OK + " / " + NOT_AVAILABLE);
        CHECK(told.text().find("\ngot 421 '4.3.2 bye'\n") != std::string::npos);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        CHECK_EQ(here.up.messages.size(), 1u);
        here.finish();
    }
}

TEST(relay, an_upstream_that_leaves_between_two_messages) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.up.script["QUIT"] = {};
        here.up.say_unasked("421 4.4.2 too slow\r\n");
        here.up.hang_up();
        here.settle();
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        CHECK_EQ(here.up.heard.size(), 2u);
        here.finish();
    }
}

TEST(relay, one_connection_for_the_messages_of_a_client) {
    scene here;
    here.up.script["end"] = {says("250 2.0.0 message ok"), says(NO), says(NOT_NOW)};
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), OK + " / " + OK + " / 354 / " + NO);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), OK + " / " + OK + " / 354 / " + NOT_NOW);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    here.finish();
    const std::string mail = "MAIL FROM:<a@client.test> / RCPT TO:<b@example> / DATA / (message) / ";
    CHECK_EQ(here.up.heard.size(), 1u);
    CHECK_EQ(here.up.conversation(0), "EHLO mx.test / " + mail + mail + "RSET / " + mail + "RSET / " + mail + "QUIT");
}

// ---------------------------------------------------------------------------------------------------------
// RSET, QUIT, and the way there
// ---------------------------------------------------------------------------------------------------------

TEST(relay, faults_at_RSET_and_QUIT) {
    struct row {
        std::string name;
        act what;
        bool times_out = false;
    };
    const std::vector<row> rows{{"4xx", says(NOT_NOW)},
                                {"5xx", says(NO)},
                                {"421", says("421 4.3.2 bye")},
                                {"closes", hangs_up()},
                                {"resets", resets()},
                                {"silence", says_nothing(), true},
                                {"no end", sends("250 ok"), true},
                                {"nonsense", sends("what\r\n")},
                                {"354", sends("354 go\r\n")},
                                {"two answers", sends("250 ok\r\n250 ok\r\n")},
                                {"10 MiB", sends(std::string(10 << 20, 'x'))},
                                {"byte by byte", says("250 ok").slowly()}};
    each(rows, [](const row& it, bool use_poll) {
        with_timeout([&](milliseconds wait) {
            smtpd::options with;
            if (it.times_out) with.upstream.command = with.upstream.quit = wait;
            scene here(use_poll, with);
            const auto another = [&] { CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED); };
            // The client's own.
            here.up.script["RSET"] = {it.what};
            CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
            CHECK_EQ(here.client.ask("RCPT TO:<dropped@example>"), OK);
            CHECK_EQ(here.client.ask("RSET"), OK);
            another();
            CHECK_EQ(joined(here.up.messages[0].rcpttos), std::string("b@example"));
            // The one before the next transaction.
            here.up.script["RSET"] = {it.what};
            here.up.script["end"] = {says(NO)};
            CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), OK + " / " + OK + " / 354 / " + NO);
            another();
            CHECK_EQ(here.up.accepted("tagged-1"), 2u);
            here.up.always["QUIT"] = it.what;
            CHECK_EQ(here.client.ask("QUIT"), std::string("221 Bye"));
            here.client.wait_for_close();
            // Whoever does not let it go is left all the same; other errors than those of manners remain.
            here.run_until([&] { return here.up.open() == 0; });
        });
    });
}

// A session that refuses RSET is of no use: MAIL inside its transaction would be refused as well.
TEST(relay, a_session_that_refuses_RSET_is_left) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
        CHECK_EQ(here.client.ask("RCPT TO:<dropped@example>"), OK);
        here.up.script["RSET"] = {says("502 5.5.1 what?")};
        CHECK_EQ(here.client.ask("RSET"), OK);
        here.run_until([&] { return here.up.open() == 0; });
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.finish();
        CHECK_EQ(here.up.heard.size(), 2u);
        CHECK_EQ(here.up.conversation(0), std::string("EHLO mx.test / MAIL FROM:<a@client.test> / "
                                                      "RCPT TO:<dropped@example> / RSET / QUIT"));
    }
}

// Deviation 53
TEST(relay, any_yes_to_the_message_is_one) {
    scene here;
    const std::string so_far = OK + " / " + OK + " / 354 / ";
    for (const auto& [said, told] : {std::pair<std::string, std::string>{"250 2.0.0 kept", "250 2.0.0 kept"},
                                     {"252 2.0.0 kept", "250 2.0.0 kept"},
                                     {"200", "250"},
                                     {"299-one\r\n299 two", "250-one\r\n250 two"}}) {
        here.up.script["end"] = {says(said)};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), so_far + told);
    }
    here.finish();
    CHECK_EQ(here.up.messages.size(), 4u);
    CHECK_EQ(here.up.heard.size(), 1u);
}

// Deviation 53
TEST(relay, an_idle_session_that_ends_as_MAIL_is_said_is_opened_again) {
    struct row {
        std::string name;
        act what;
    };
    const std::vector<row> rows{
        {"421", says("421 4.4.2 idle for too long").then_hangs_up()}, {"closes", hangs_up()}, {"resets", resets()}};
    each(rows, [](const row& it, bool use_poll) {
        scene here(use_poll);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.up.script["MAIL"] = {it.what};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        CHECK_EQ(here.up.heard.size(), 2u);
        // Once: a server that does it again is not available. The next transaction begins with a new connection.
        here.up.script["MAIL"] = {it.what, it.what};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), NOT_AVAILABLE);
        CHECK_EQ(here.up.heard.size(), 3u);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        CHECK_EQ(here.up.heard.size(), 4u);
        here.up.script["MAIL"] = {says(NO)};   // that is an answer
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), NO);
        CHECK_EQ(here.up.messages.size(), 3u);
        CHECK_EQ(here.up.heard.size(), 4u);
        here.client.ask("QUIT");
        here.client.wait_for_close();
    });
}

TEST(relay, RSET_without_a_transaction_asks_nobody) {
    scene here;
    CHECK_EQ(here.client.ask("RSET"), OK);
    CHECK_EQ(here.up.heard.size(), 0u);
    CHECK_EQ(here.client.ask("RSET x"), std::string("501 Syntax: RSET"));
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.client.ask("RSET"), OK);
    here.finish();
    CHECK_EQ(here.up.conversation(0),
             std::string("EHLO mx.test / MAIL FROM:<a@client.test> / RCPT TO:<b@example> / DATA / (message) / QUIT"));
}

TEST(relay, a_refused_connection) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        here.up.refuse();
        CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), NOT_AVAILABLE);
        CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), NOT_AVAILABLE);
        CHECK_EQ(here.client.ask("DATA"), NOT_AVAILABLE);
        CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), NOT_AVAILABLE);
        CHECK_EQ(here.client.ask("RSET"), OK);
        here.up.accept_again();
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.finish();
    }
}

TEST(relay, a_connection_that_nobody_answers) {
    for (const bool use_poll : {false, true}) {
        asyncore::map_type map;
        // A listener that does not accept, with its queue full.
        asyncore::socket_type listener(AF_INET, SOCK_STREAM);
        listener.bind({support::loopback(), 0});
        listener.listen(0);
        std::vector<asyncore::socket_type> queue;
        for (int i = 0; i < 3; ++i) {
            queue.emplace_back(AF_INET, SOCK_STREAM);
            queue.back().connect_ex(asyncore::getaddrinfo(listener.getsockname()).front());
        }
        smtpd::options with;
        with.upstream.connect = with.upstream.greeting = milliseconds(25);
        smtpd::PureProxy server({"127.0.0.1", 0}, listener.getsockname(), scene::prepared(map, with));
        caller client(map, server.socket->getsockname(), use_poll);
        client.answer();
        client.ask("EHLO client.test");
        CHECK_EQ(client.ask("MAIL FROM:<a@client.test>"), NOT_AVAILABLE);
        CHECK_EQ(client.ask("QUIT"), std::string("221 Bye"));
        client.wait_for_close();
    }
}

// A port of this host that nobody listens at may be given to the connection itself, which TCP then connects to
// itself: it must not take its own words for an upstream's.
TEST(relay, a_connection_to_itself_is_refused) {
    struct narcissus : smtpd::SMTP {
        asyncore::address own;
        using SMTP::SMTP;
        void add_channel(asyncore::map_type* with) override {
            SMTP::add_channel(with);
            socket->bind(own);
        }
    };
    for (const bool use_poll : {false, true}) {
        asyncore::map_type map;
        smtpd::timeouts wait;
        wait.greeting = std::chrono::seconds(5);
        narcissus session(&map, wait);
        {
            asyncore::socket_type free(AF_INET, SOCK_STREAM);
            free.bind({support::loopback(), 0});
            session.own = free.getsockname();
        }
        std::vector<std::string> told;
        session.connect(session.own, [&](const smtpd::reply& answer) { told.push_back(answer.line()); });
        support::run_until(
            map, [&] { return !told.empty(); }, use_poll);
        CHECK_EQ(joined(told), std::system_error(ECONNREFUSED, std::generic_category(), "connect").what());
        CHECK(!session.connected);
        CHECK(map.empty());
    }
}

TEST(relay, a_name_and_a_name_that_is_none) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        support::upstream named(here.map, "127.0.0.1");
        here.server._remoteaddr = {"localhost", named.port()};   // ::1 may come first, and refuse
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.finish();
        here.run_until([&] { return named.open() == 0; });
        named.check();
        CHECK_EQ(named.messages.size(), 1u);
        CHECK_EQ(here.up.heard.size(), 0u);
        caller again(here.map, here.server.socket->getsockname(), use_poll);
        again.answer();
        again.ask("EHLO client.test");
        here.server._remoteaddr = {"999.999.999.999", 25};
        CHECK_EQ(again.ask("MAIL FROM:<a@client.test>"), NOT_AVAILABLE);
        here.server._remoteaddr = {};
        CHECK_EQ(again.ask("MAIL FROM:<a@client.test>"), NOT_AVAILABLE);
        CHECK_EQ(again.ask("QUIT"), std::string("221 Bye"));
        again.wait_for_close();
    }
}

// ---------------------------------------------------------------------------------------------------------
// The client leaves, the server stops, the server goes
// ---------------------------------------------------------------------------------------------------------

namespace {

// How far a client comes: what it says, after EHLO, and the stage at which the upstream keeps it waiting.
struct moment {
    std::string name, said, held;
    std::size_t answers;   // that it has got by then
};

std::vector<moment> moments() {
    const std::string mail = "MAIL FROM:<a@client.test>\r\n", rcpt = "RCPT TO:<b@example>\r\n", data = "DATA\r\n";
    return {{"after EHLO", "", "", 0},
            {"greeting owed", mail, "greeting", 0},
            {"EHLO owed", mail, "EHLO", 0},
            {"MAIL owed", mail, "MAIL", 0},
            {"after MAIL", mail, "", 1},
            {"RCPT owed", mail + rcpt, "RCPT", 1},
            {"after RCPT", mail + rcpt, "", 2},
            {"after DATA", mail + rcpt + data, "", 3},
            {"in the message", mail + rcpt + data + "Subject: tagged-1\r\n\r\nHel", "", 3},
            {"before the last dot", mail + rcpt + data + body + "\r\n", "", 3},
            {"DATA owed", mail + rcpt + data + body + "\r\n.\r\n", "DATA", 3},
            {"the message's answer owed", mail + rcpt + data + body + "\r\n.\r\n", "end", 3},
            {"RSET owed", mail + rcpt + "RSET\r\n", "RSET", 2},
            {"more in hand", mail + rcpt + "MAIL FROM:<c@client.test>\r\nRSET\r\nNOOP\r\n", "RCPT", 1}};
}

template <typename Scene>
void reach(Scene& here, const moment& it) {
    if (!it.held.empty()) {
        act usual = says(it.held == "greeting" ? "220 ready" : it.held == "DATA" ? "354 go" : "250 fine");
        here.up.script[it.held] = {usual.when_released()};
    }
    std::string rest = it.said;
    for (std::size_t i = 0; i < it.answers; ++i) {
        const std::size_t end = rest.find("\r\n");
        CHECK_EQ(here.client.ask(rest.substr(0, end)).substr(0, 3), std::string(rest[0] == 'D' ? "354" : "250"));
        rest.erase(0, end + 2);
    }
    here.client.say(rest);
    here.run_until([&] { return it.held.empty() || here.up.held() == 1 || !here.client.received.empty(); });
    here.settle();
    CHECK_EQ(here.client.received, std::string());
}

// Nothing was taken but a whole message.
void check_mail(const upstream& up, const moment& it) {
    CHECK(up.messages.size() <= (it.said.find("\r\n.\r\n") != it.said.npos ? 1u : 0u));
}

enum class way { closes, resets, hangs_on };

}   // namespace

TEST(relay, the_client_leaves_at_any_stage) {
    for (const way how : {way::closes, way::resets}) {
        for (const bool released : {true, false}) {
            each(moments(), [&](const moment& it, bool use_poll) {
                with_timeout([&](milliseconds wait) {
                    smtpd::options with;
                    if (!released)
                        with.upstream.quit = with.upstream.command = with.upstream.greeting =
                            with.upstream.data_initiation = with.upstream.data_termination = wait;
                    scene here(use_poll, with);
                    reach(here, it);
                    how == way::closes ? here.client.close() : here.client.reset();
                    here.settle();
                    if (released && here.up.held() > 0) here.up.release();
                    here.wait_until_upstream_is_left();
                    check_mail(here.up, it);
                    here.run_until([&] { return here.map.size() == 2; });   // the two listeners
                });
            });
        }
    }
}

TEST(relay, stop_with_a_relay_in_hand) {
    const std::string GOODBYE = "421 Error: server is shutting down";
    each(moments(), [&](const moment& it, bool use_poll) {
        scene here(use_poll);
        reach(here, it);
        here.server.stop(milliseconds(60000));
        here.settle();
        if (here.up.held() > 0) {
            CHECK_EQ(here.client.received, std::string());
            here.up.release();
            // Its answer first, then the goodbye, and nothing of what else was in hand.
            const std::string told = here.client.answer();
            CHECK(told == OK || (it.held == "end" && told == "250 fine") || (it.held == "DATA" && told == TAKEN));
        } else if (it.said.find("DATA") != it.said.npos) {
            CHECK_EQ(here.client.received, std::string());
            const std::string rest = it.name == "after DATA"       ? body + "\r\n"
                                     : it.name == "in the message" ? "lo\r\n"
                                                                   : "";
            here.client.say(rest + ".\r\n");
            CHECK_EQ(here.client.answer(), TAKEN);
        }
        CHECK_EQ(here.client.answer(), GOODBYE);
        here.client.wait_for_close();
        here.wait_until_upstream_is_left();
        CHECK_EQ(here.client.received, std::string());
        here.run_until([&] { return here.map.size() == 1; });
    });
}

TEST(relay, stop_does_not_wait_for_ever) {
    each(moments(), [&](const moment& it, bool use_poll) {
        if (it.held.empty()) return;
        smtpd::options with;
        with.upstream.quit = milliseconds(10);
        scene here(use_poll, with);
        reach(here, it);
        here.server.stop(milliseconds(10));
        here.client.wait_for_close();
        CHECK(here.client.received.substr(0, 3) != "250");
        here.wait_until_upstream_is_left();
        here.run_until([&] { return here.map.size() == 1; });
    });
}

TEST(relay, the_server_goes_with_a_relay_in_hand) {
    for (const bool released : {true, false}) {
        each(moments(), [&](const moment& it, bool use_poll) {
            smtpd::options with;
            if (!released) with.upstream.quit = milliseconds(10);
            scene here(use_poll, with);
            reach(here, it);
            here.owned.reset();
            if (released && here.up.held() > 0) here.up.release();
            here.client.wait_for_close();
            CHECK_EQ(here.client.received, std::string());
            here.wait_until_upstream_is_left();
            check_mail(here.up, it);
            here.run_until([&] { return here.map.size() == 1; });   // the upstream's listener
        });
    }
}

TEST(relay, everything_goes_with_a_relay_in_hand) {
    each(moments(), [&](const moment& it, bool use_poll) {
        scene here(use_poll);
        reach(here, it);
        asyncore::close_all(&here.map);
        CHECK(here.map.empty());
    });
}

TEST(relay, the_server_goes_while_a_message_is_being_sent) {
    for (const way how : {way::closes, way::hangs_on}) {
        for (const bool use_poll : {false, true}) {
            scene here(use_poll);
            here.up.script["body"] = {sends("").when_released()};
            CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
            CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), OK);
            here.client.ask("DATA");
            here.client.say(body + "\r\n" + std::string(8 << 20, 'x') + "\r\n.\r\n");
            here.wait_until_held();
            if (how == way::closes) here.client.reset();
            here.owned.reset();
            here.wait_until_upstream_is_left();
            CHECK_EQ(here.up.messages.size(), 0u);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Pipelines
// ---------------------------------------------------------------------------------------------------------

namespace {

const std::string PIPELINE =
    "MAIL FROM:<a@client.test>\r\nRCPT TO:<b@example>\r\nRCPT TO:<no@example>\r\nRCPT TO:<c@example>\r\nDATA\r\n" +
    body +
    "\r\n.\r\nMAIL FROM:<a@client.test>\r\nRCPT TO:<no@example>\r\nRSET\r\nMAIL FROM:<d@client.test>\r\n"
    "RCPT TO:<later@example>\r\nRCPT TO:<e@example>\r\nDATA\r\n.\r\nNOOP\r\nQUIT\r\n";
const std::string END_DATA = "354 End data with <CR><LF>.<CR><LF>\r\n";
const std::string PIPELINE_TOLD = "250 OK\r\n250 OK\r\n" + NO + "\r\n250 OK\r\n" + END_DATA + TAKEN + "\r\n250 OK\r\n" +
                                  NO + "\r\n250 OK\r\n250 OK\r\n" + NOT_NOW + "\r\n250 OK\r\n" + END_DATA + TAKEN +
                                  "\r\n250 OK\r\n221 Bye\r\n";

void run_pipeline(scene& here, const std::vector<std::string>& pieces) {
    here.up.always["RCPT TO:<no@example>"] = says(NO);
    here.up.always["RCPT TO:<later@example>"] = says(NOT_NOW);
    caller client(here.map, here.server.socket->getsockname(), here.use_poll);
    client.answer();
    client.ask("EHLO client.test");
    here.up.messages.clear();
    for (const auto& piece : pieces) {
        client.say(piece);
        here.use_poll ? asyncore::poll2(0.0, &here.map) : asyncore::poll(0.0, &here.map);
    }
    client.wait_for_close();
    CHECK_EQ(client.received, PIPELINE_TOLD);
    here.wait_until_upstream_is_left();
    CHECK_EQ(here.up.messages.size(), 2u);
    CHECK_EQ(joined(here.up.messages[0].rcpttos), std::string("b@example c@example"));
    CHECK_EQ(joined(here.up.messages[1].rcpttos), std::string("e@example"));
    CHECK_EQ(here.up.messages[1].mailfrom, std::string("MAIL FROM:<d@client.test>"));
    CHECK_EQ(here.up.messages[0].data, std::string("Subject: tagged-1\nX-Peer: 127.0.0.1\n\nHello\n"));
}

}   // namespace

TEST(relay, a_pipeline_in_one_packet) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        run_pipeline(here, {PIPELINE});
    }
}

TEST(relay, a_pipeline_split_at_every_byte) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        for (std::size_t i = use_poll ? 1 : 2; i < PIPELINE.size(); i += 2)
            run_pipeline(here, {PIPELINE.substr(0, i), PIPELINE.substr(i)});
        std::vector<std::string> bytes;
        for (const char c : PIPELINE) bytes.emplace_back(1, c);
        run_pipeline(here, bytes);
    }
}

TEST(relay, a_pipeline_that_loses_its_upstream) {
    const std::string mail = "MAIL FROM:<a@client.test>\r\nRCPT TO:<b@example>\r\nRCPT TO:<c@example>\r\nDATA\r\n";
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        here.up.script["RCPT"] = {says("250 fine"), hangs_up()};
        here.client.say(mail + "RSET\r\n" + mail + body + "\r\n.\r\nQUIT\r\n");
        here.client.wait_for_close();
        const std::string lost = NOT_AVAILABLE + "\r\n";
        CHECK_EQ(here.client.received, "250 OK\r\n250 OK\r\n" + lost + lost +
                                           "250 OK\r\n250 OK\r\n250 OK\r\n250 OK\r\n" + END_DATA + TAKEN +
                                           "\r\n221 Bye\r\n");
        here.wait_until_upstream_is_left();
        CHECK_EQ(here.up.messages.size(), 1u);
    }
}

// ---------------------------------------------------------------------------------------------------------
// One message stays one message
// ---------------------------------------------------------------------------------------------------------

namespace {

// What seems to end a message, somewhere; the real end, CR LF . CR LF, is not among them.
std::vector<std::string> false_ends() {
    std::vector<std::string> all;
    const std::vector<std::string> ends{"\n", "\r", "\r\n", "\n\n", "\r\r", "\n\r", "\r\r\n", "\r\n\n"};
    for (const auto& before : ends)
        for (const std::string dots : {".", "..", "..."})
            for (const auto& after : ends) all.push_back(before + dots + after);
    const std::string nul(1, '\0');
    for (const std::string& what : {nul + ".", "." + nul, std::string(". "), std::string(".\t"), std::string(" ."),
                                    std::string(".\v"), std::string(".\x85"), std::string("\xe2\x80\xa8.")})
        for (const std::string before : {"\n", "\r", "\r\n"})
            for (const std::string after : {"\n", "\r", "\r\n"}) all.push_back(before + what + after);
    all.push_back("\r" + nul + "\n." + "\r" + nul + "\n");
    all.push_back("\r\n." + nul + "\r\n" + nul + ".\r\n");
    const auto real = [](const std::string& it) { return it.find("\r\n.\r\n") != it.npos; };
    all.erase(std::remove_if(all.begin(), all.end(), real), all.end());
    return all;
}

// The lines of `text`, as `end` ends them.
std::vector<std::string> lines_of(const std::string& text, const std::vector<std::string>& ends) {
    std::vector<std::string> lines(1);
    for (std::size_t at = 0; at < text.size();) {
        const auto found = std::find_if(ends.begin(), ends.end(),
                                        [&](const auto& end) { return text.compare(at, end.size(), end) == 0; });
        if (found == ends.end()) {
            lines.back() += text[at++];
        } else {
            lines.emplace_back();
            at += found->size();
        }
    }
    return lines;
}

// What the upstream is to get for what a client says after DATA, without the last CR LF . CR LF: dots are taken off
// after CR LF; then each line end, whichever it is, becomes CR LF, and each dot at the start of a line two.
std::string expected_wire(const std::string& said) {
    std::string text;
    for (const auto& line : lines_of(said, {"\r\n"})) text += line.substr(line.substr(0, 1) == "." ? 1 : 0) + "\n";
    auto lines = lines_of(text, {"\r\n", "\r", "\n"});
    lines.pop_back();
    std::string wire;
    for (const auto& line : lines) wire += (line.substr(0, 1) == "." ? "." : "") + line + "\r\n";
    return wire;
}

std::string without_x_peer(std::string wire) {
    const std::string line = "X-Peer: 127.0.0.1\r\n";
    const std::size_t at = wire.find(line);
    return at == wire.npos ? "no X-Peer in " + wire : wire.erase(at, line.size());
}

const std::string EVIL =
    "MAIL FROM:<evil@client.test>\r\nRCPT TO:<victim@example>\r\nDATA\r\nSubject: evil\r\n\r\nevil";

void smuggle(scene& here, const std::vector<std::string>& pieces) {
    here.up.messages.clear();
    CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
    CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), OK);
    CHECK_EQ(here.client.ask("DATA").substr(0, 3), std::string("354"));
    std::string said;
    for (const auto& piece : pieces) {
        said += piece;
        here.client.say(piece);
        here.use_poll ? asyncore::poll2(0.0, &here.map) : asyncore::poll(0.0, &here.map);
    }
    here.client.say("\r\n.\r\n");
    try {
        CHECK_EQ(here.client.answer(), TAKEN);
        CHECK_EQ(here.up.messages.size(), 1u);
        CHECK_EQ(joined(here.up.messages[0].rcpttos), std::string("b@example"));
        CHECK_EQ(without_x_peer(here.up.messages[0].wire), expected_wire(said));
        CHECK_EQ(here.client.received, std::string());
    } catch (const std::exception& error) {
        throw test::failure(error.what() + ("\n    said " + test::show(said)) + "\n    rest " +
                            test::show(here.client.received) + here.up.conversations());
    }
}

}   // namespace

TEST(relay, nothing_in_a_message_ends_it) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        for (const auto& it : false_ends()) {
            smuggle(here, {"Subject: x\r\n\r\nHello" + it + EVIL});
            smuggle(here, {it + EVIL + it});
            smuggle(here, {"Subject: x" + it + EVIL + it + "\r\n"});
        }
        here.finish();
        CHECK_EQ(here.up.heard.size(), 1u);
    }
}

TEST(relay, nothing_in_a_message_ends_it_split_at_every_byte) {
    bool use_poll = false;
    for (const auto& it : false_ends()) {
        scene here(use_poll = !use_poll);
        const std::string said = "S: x\r\n\r\nHello" + it + "QUIT";
        for (std::size_t i = said.size() - it.size() - 5; i < said.size() - 2; ++i)
            smuggle(here, {said.substr(0, i), said.substr(i)});
        std::vector<std::string> bytes;
        for (const char c : it + EVIL.substr(0, 12) + it) bytes.emplace_back(1, c);
        smuggle(here, bytes);
        here.finish();
    }
}

// Deviation 37
TEST(relay, any_bytes_in_lines_of_any_length) {
    std::string all;
    for (int round = 0; round < 3; ++round)
        for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
    scene here;
    smuggle(here, {"S: x\r\n\r\n" + all});
    smuggle(here, {"S: x\r\n\r\n" + std::string(300000, '.') + "\r\n" + std::string(200000, '\n') +
                   std::string(70000, '\r')});
    for (std::size_t n = 65530; n < 65542; ++n) smuggle(here, {std::string(n, 'x') + "\n.\n." + std::string(n, '.')});
    here.finish();
}

namespace {

double cpu_seconds() {
    timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

// What it takes a proxy to pass such a message on to a server that throws it away.
template <typename Proxy>
double seconds_for(const std::string& message, const std::string& recipient) {
    struct bin : smtpd::SMTPServer {
        using SMTPServer::SMTPServer;
        std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                                   const std::vector<std::string>&, std::string&&,
                                                   const smtpd::message_options&) override {
            return "250 gone";
        }
    };
    asyncore::map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    with.mailman_lists = "/";
    bin next({"127.0.0.1", 0}, {}, with);
    Proxy proxy({"127.0.0.1", 0}, next.socket->getsockname(), with);
    caller client(map, proxy.socket->getsockname());
    client.answer();
    client.ask("EHLO client.test");
    const double before = cpu_seconds();
    CHECK_EQ(client.mail("<a@client.test>", {recipient}, message), OK + " / " + OK + " / 354 / 250 gone");
    return cpu_seconds() - before;
}

std::string repeated(const std::string& what, std::size_t size) {
    std::string text;
    text.reserve(size + what.size());
    while (text.size() < size) text += what;
    return text;
}

}   // namespace

// A body of bare CR took time by the square of its size: seconds for each MiB.
TEST(relay, no_message_costs_more_than_its_size) {
    constexpr std::size_t size = 2 << 20;
    const double plain = seconds_for<smtpd::PureProxy>(repeated(std::string(70, 'x') + "\r\n", size), "b@example");
    for (const std::string line : {"\r", "\n", ".\n", "\r\r\n", "\n\r", ".\r", "a\r", "a\n", "x-peer\r", "x"})
        for (const std::string before : {"", "Subject: x\r\n\r\n"}) {
            const std::string message = before + repeated(line, size);
            const double one = seconds_for<smtpd::PureProxy>(message, "b@example");
            const double other = seconds_for<smtpd::MailmanProxy>(message, "b@example");
            const std::string which = asyncore::repr(before + line) + ": " + std::to_string(one) + " and " +
                                      std::to_string(other) + " s, not " + std::to_string(plain);
            if (one > 0.25 + 20 * plain || other > 0.25 + 20 * plain) throw test::failure(which);
        }
}

// ---------------------------------------------------------------------------------------------------------
// X-Peer, options
// ---------------------------------------------------------------------------------------------------------

// Deviation 51
TEST(relay, X_Peer_is_the_last_header_line) {
    struct row {
        std::string name, wire;
    };
    const std::string X = "X-Peer: 127.0.0.1\r\n";
    const std::vector<row> rows{
        {"Subject: x\r\n\r\nHello\r\n", "Subject: x\r\n" + X + "\r\nHello\r\n"},
        {"A: 1\r\nB: 2\r\n\r\nHello\r\n\r\nmore\r\n", "A: 1\r\nB: 2\r\n" + X + "\r\nHello\r\n\r\nmore\r\n"},
        {"A: 1\r\n folded\r\n\r\nHello\r\n", "A: 1\r\n folded\r\n" + X + "\r\nHello\r\n"},
        {"Subject: x\r\n", "Subject: x\r\n" + X},
        {"Subject: x\r\n\r\n", "Subject: x\r\n" + X + "\r\n"},
        {"\r\nno header\r\n", X + "\r\nno header\r\n"},
        {"\r\n", X + "\r\n"},
        {"", X + "\r\n"},
        {"Hello, no header\r\nat all\r\n", "Hello, no header\r\nat all\r\n" + X},
        {"A: 1\n\nHello\r\n", "A: 1\r\n" + X + "\r\nHello\r\n"},
        {"X-Peer: forged\r\n\r\nHello\r\n", "X-Peer: forged\r\n" + X + "\r\nHello\r\n"},
        // The first empty line is the one that is sent, whatever its ends are here.
        {"Subject: a\r\rbody\r\n\r\nmore\r\n", "Subject: a\r\n" + X + "\r\nbody\r\n\r\nmore\r\n"},
        {"Subject: a\n\rbody\r\n\r\nmore\r\n", "Subject: a\r\n" + X + "\r\nbody\r\n\r\nmore\r\n"},
        {"Subject: a\r\n\rbody\r\n", "Subject: a\r\n" + X + "\r\nbody\r\n"},
        {"Subject: a\r\n\nbody\r\n", "Subject: a\r\n" + X + "\r\nbody\r\n"},
        {"\rbody\r\n\r\nmore\r\n", X + "\r\nbody\r\n\r\nmore\r\n"},
        // CR CR LF is one line end, and ends no header.
        {"A: 1\r\r\nB: 2\r\r\n\r\nHello\r\n", "A: 1\r\nB: 2\r\n" + X + "\r\nHello\r\n"},
        {"A: 1\r\r\n", "A: 1\r\n" + X},
        {"A: 1\r\r\r\n", "A: 1\r\n" + X + "\r\n"},
        {"A: 1\r\r\n\r\n", "A: 1\r\n" + X + "\r\n"}};
    each(rows, [](const row& it, bool use_poll) {
        scene here(use_poll);
        here.client.ask("MAIL FROM:<a@client.test>");
        here.client.ask("RCPT TO:<b@example>");
        here.client.ask("DATA");
        here.client.say(it.name + ".\r\n");
        CHECK_EQ(here.client.answer(), TAKEN);
        CHECK_EQ(here.up.messages[0].wire, it.wire);
        here.finish();
    });
}

// Deviation 50
TEST(relay, more_than_50_hops_are_too_many) {
    const auto with_hops = [](int count, const std::string& before = "") {
        std::string text = before;
        for (int i = 0; i < count; ++i) text += i % 2 ? "x-peer: 192.0.2.1\r\n" : "X-Peer: 192.0.2.1\r";
        return text + "\r\nX-Peer: not in the header";
    };
    scene here;
    const std::string refused = OK + " / " + OK + " / 354 / 554 Error: too many hops";
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, with_hops(50)), RELAYED);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, with_hops(51)), refused);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, with_hops(51, "Subject: x\n")), refused);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, with_hops(50, "Subject: X-Peer: x\n")), RELAYED);
    CHECK_EQ(here.up.messages.size(), 2u);
    here.finish();
}

// Two proxies that send to each other. MAIL goes round, until one of them has no descriptor left.
TEST(relay, a_circle_ends) {
    rlimit before{};
    CHECK_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
    const rlimit few{200, before.rlim_max};
    asyncore::map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    support::captured quiet(std::cout);
    {
        smtpd::PureProxy one({"127.0.0.1", 0}, {}, with), other({"127.0.0.1", 0}, one.socket->getsockname(), with);
        one._remoteaddr = other.socket->getsockname();
        caller client(map, one.socket->getsockname());
        client.answer();
        client.ask("EHLO client.test");
        // The first time that the undefined-behaviour sanitizer meets an exception it takes descriptors: now.
        smtpd::SMTP(&map).connect(asyncore::address::unix_path("/no/such/socket"), [](const smtpd::reply&) {});
        CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
        std::string told;
        try {
            told = client.ask("MAIL FROM:<a@client.test>");
        } catch (const std::exception& error) {
            told = error.what();
        }
        ::setrlimit(RLIMIT_NOFILE, &before);
        CHECK_EQ(told, NOT_AVAILABLE);
        client.ask("QUIT");
        client.wait_for_close();
        support::run_until(map, [&] { return map.size() == 2; });
        CHECK_EQ(map.size(), 2u);
    }
}

// Deviation 41
TEST(relay, X_Peer_of_a_UNIX_socket_is_unix) {
    scene here;
    caller local(here.server, false);
    local.answer();
    local.ask("EHLO client.test");
    CHECK_EQ(local.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.up.messages[0].data, std::string("Subject: tagged-1\nX-Peer: unix\n\nHello\n"));
    CHECK_EQ(local.ask("QUIT"), std::string("221 Bye"));
    here.wait_until_upstream_is_left();
}

// Deviations 35, 36
TEST(relay, options_are_passed_on_where_they_are_offered) {
    struct row {
        std::string name;
        std::vector<std::string> offered;
        std::string said, heard, told = OK;
    };
    const std::string SORRY = "550 Error: SMTPUTF8 is not supported by the next server";
    const std::vector<row> rows{
        {"all", {"SIZE", "8BITMIME", "SMTPUTF8"}, " size=99 Body=8bitmime smtputf8", " SIZE=99 BODY=8BITMIME SMTPUTF8"},
        {"none said", {"SIZE", "8BITMIME", "SMTPUTF8"}, "", ""},
        {"none offered", {}, " SIZE=99 BODY=8BITMIME", ""},
        {"SIZE", {"SIZE 1000"}, " SIZE=99 BODY=8BITMIME", " SIZE=99"},
        {"8BITMIME", {"8bitmime"}, " SIZE=99 BODY=8BITMIME", " BODY=8BITMIME"},
        {"7BIT", {"8BITMIME"}, " BODY=7BIT", " BODY=7BIT"},
        {"BODY is no name", {"BODY"}, " BODY=8BITMIME", ""},
        {"SMTPUTF8", {"SMTPUTF8"}, " SMTPUTF8", " SMTPUTF8"},
        {"no SMTPUTF8", {"SIZE", "8BITMIME"}, " SMTPUTF8", "", SORRY},
        {"SMTPUTF8 without the rest", {"SMTPUTF8"}, " SMTPUTF8 BODY=8BITMIME", " SMTPUTF8"}};
    each(rows, [](const row& it, bool use_poll) {
        smtpd::options with;
        with.enable_SMTPUTF8 = true;
        scene here(use_poll, with);
        here.up.extensions = it.offered;
        if (it.offered.empty()) here.up.script["EHLO"] = {says("502 5.5.1 what?")};
        CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>" + it.said), it.told);
        if (it.told == OK) CHECK_EQ(here.up.heard[0].back(), "MAIL FROM:<a@client.test>" + it.heard);
        // The session goes on, on the same connection.
        CHECK_EQ(here.client.ask("RSET"), OK);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body + "\xc3\xa4\xff"), RELAYED);
        CHECK_EQ(here.up.messages[0].data, "Subject: tagged-1\nX-Peer: 127.0.0.1\n\nHello\xc3\xa4\xff\n");
        here.finish();
        CHECK_EQ(here.up.heard.size(), 1u);
    });
}

// Deviation 52
TEST(relay, SMTPUTF8_is_declared_for_who_needs_it) {
    const std::string SORRY = "550 Error: SMTPUTF8 is not supported by the next server";
    const std::string A = "<\xc3\xa4@client.test>", B = "\xc3\xbc@example";
    for (const bool offered : {true, false}) {
        scene here;   // which does not offer it itself
        if (offered) here.up.extensions = {"SMTPUTF8"};
        CHECK_EQ(here.client.mail(A, {"b@example"}, body), offered ? RELAYED : SORRY);
        CHECK_EQ(here.client.mail("<a@client.test>", {B}, body), offered ? RELAYED : OK + " / " + SORRY);
        CHECK_EQ(here.client.ask("RSET"), OK);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        // The first recipient decides what MAIL says.
        const std::string late = offered ? "550 Error: SMTPUTF8 was not declared" : SORRY;
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example", B, "c@example"}, body),
                 OK + " / " + OK + " / " + late + " / " + OK + " / 354 / " + TAKEN);
        CHECK_EQ(here.client.mail("<a@client.test>", {B, "c@example", B}, body),
                 offered ? OK + " / " + OK + " / " + RELAYED
                         : OK + " / " + SORRY + " / " + OK + " / " + SORRY + " / 354 / " + TAKEN);
        here.finish();
        for (const auto& it : here.up.messages) {
            bool needed = it.mailfrom.find("\xc3") != it.mailfrom.npos;
            for (const auto& to : it.rcpttos) needed = needed || to == B;
            CHECK_EQ(it.mailfrom.find(" SMTPUTF8") != it.mailfrom.npos, needed);
        }
    }
}

// Deviation 40
TEST(relay, addresses_are_passed_on_as_they_are) {
    scene here;
    for (const std::string it : {"a@b", "\"a b\"@b", "a+b=c%d!e@b", "a@[127.0.0.1]", "a"}) {
        CHECK_EQ(here.client.mail("<" + it + ">", {it}, body), RELAYED);
        CHECK_EQ(here.up.messages.back().mailfrom, "MAIL FROM:<" + it + ">");
        CHECK_EQ(joined(here.up.messages.back().rcpttos), it);
    }
    CHECK_EQ(here.client.mail("<>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.up.messages.back().mailfrom, std::string("MAIL FROM:<>"));
    here.finish();
}

// ---------------------------------------------------------------------------------------------------------
// Subclasses
// ---------------------------------------------------------------------------------------------------------

namespace {

struct filter : smtpd::PureProxy {
    using PureProxy::PureProxy;
    using hook = std::function<std::optional<std::string>(filter&, const asyncore::address&, const std::string&,
                                                          const std::vector<std::string>&, std::string&&,
                                                          const smtpd::message_options&)>;
    hook process;

    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        auto made = PureProxy::channel_class(std::move(conn), from);
        made->ignore_log_types = {"warning", "error"};
        return made;
    }
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        return process(*this, peer, mailfrom, rcpttos, std::move(data), kwargs);
    }
    std::optional<std::string> pass(const asyncore::address& peer, const std::string& mailfrom,
                                    const std::vector<std::string>& rcpttos, std::string&& data,
                                    const smtpd::message_options& kwargs) {
        return PureProxy::process_message(peer, mailfrom, rcpttos, std::move(data), kwargs);
    }
};

using filtered = scene_with<filter>;
const std::string SO_FAR = OK + " / " + OK + " / 354 / ";

}   // namespace

TEST(relay, a_filter_refuses_with_a_text) {
    filtered here;
    here.server.process = [](filter& it, const auto& peer, const auto& from, const auto& to, auto&& data,
                             const auto& kwargs) -> std::optional<std::string> {
        if (data.find("spam") != data.npos) return "554 5.7.1 no spam";
        return it.pass(peer, from, to, std::move(data), kwargs);
    };
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, "spam"), SO_FAR + "554 5.7.1 no spam");
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, "spam"), SO_FAR + "554 5.7.1 no spam");
    here.finish();
    CHECK_EQ(here.up.messages.size(), 1u);
    CHECK_EQ(here.up.heard.size(), 1u);
}

TEST(relay, a_filter_rewrites_and_throws) {
    filtered here;
    here.server.process = [](filter& it, const auto& peer, const auto& from, const auto& to, auto&& data,
                             const auto& kwargs) -> std::optional<std::string> {
        if (data.find("throw") != data.npos) throw std::runtime_error("broken filter");
        data.insert(0, "X-Seen: yes\n");
        return it.pass(peer, from, to, std::move(data), kwargs);
    };
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.up.messages[0].data, std::string("X-Seen: yes\nSubject: tagged-1\nX-Peer: 127.0.0.1\n\nHello\n"));
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, "throw"), SO_FAR + "451 Error: message not processed");
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    here.finish();
    CHECK_EQ(here.up.heard.size(), 1u);
}

// Deviation 38
TEST(relay, changed_recipients_are_all_or_none) {
    struct row {
        std::string name, told;
        std::vector<act> answers;   // to the recipients of the second connection
    };
    const std::vector<row> rows{{"all", TAKEN, {says("250 fine"), says("251 fine")}},
                                {"none", NO, {says(NO), says(NO)}},
                                {"the first not", NOT_NOW, {says(NOT_NOW), says("250 fine")}},
                                {"the second not", NO, {says("250 fine"), says(NO)}},
                                {"lost", NOT_AVAILABLE, {says("250 fine"), hangs_up()}}};
    each(rows, [](const row& it, bool use_poll) {
        filtered here(use_poll);
        here.server.process = [](filter& server, const auto& peer, const auto& from, const auto&, auto&& data,
                                 const auto& kwargs) {
            return server.pass(peer, from, {"c@example", "d@example"}, std::move(data), kwargs);
        };
        here.up.script["RCPT TO:<c@example>"] = {it.answers[0]};
        here.up.script["RCPT TO:<d@example>"] = {it.answers[1]};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), SO_FAR + it.told);
        const bool taken = it.told == TAKEN;
        CHECK_EQ(here.up.messages.size(), taken ? 1u : 0u);
        if (taken) CHECK_EQ(joined(here.up.messages[0].rcpttos), std::string("c@example d@example"));
        if (taken) CHECK_EQ(here.up.messages[0].data, std::string("Subject: tagged-1\nX-Peer: 127.0.0.1\n\nHello\n"));
        here.finish();
        CHECK_EQ(here.up.heard.size(), 2u);
        CHECK_EQ(here.up.conversation(0),
                 std::string("EHLO mx.test / MAIL FROM:<a@client.test> / RCPT TO:<b@example> / QUIT"));
    });
}

// The message goes by a connection of its own, with the client's options but for the size.
TEST(relay, changed_recipients_and_options) {
    struct row {
        std::string name, told;
        std::function<void(filtered&)> then = nullptr;   // in the filter
    };
    const std::vector<row> rows{{"passed on", TAKEN},
                                {"not offered any more", "550 Error: SMTPUTF8 is not supported by the next server",
                                 [](filtered& it) { it.up.extensions = {"8BITMIME"}; }},
                                {"refused at HELO", NO,
                                 [](filtered& it) {
                                     it.up.script["EHLO"] = {says("502 5.5.1 what?")};
                                     it.up.script["HELO"] = {says(NO)};
                                 }},
                                {"lost at once", NOT_AVAILABLE, [](filtered& it) { it.server._remoteaddr = {}; }}};
    each(rows, [](const row& it, bool use_poll) {
        smtpd::options with;
        with.enable_SMTPUTF8 = true;
        filtered here(use_poll, with);
        here.up.extensions = {"SIZE", "8BITMIME", "SMTPUTF8"};
        here.server.process = [&](filter& server, const auto& peer, const auto& from, const auto&, auto&& data,
                                  const auto& kwargs) {
            if (it.then) it.then(here);
            return server.pass(peer, from, {"c@example"}, std::move(data), kwargs);
        };
        CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test> SIZE=5 BODY=8BITMIME SMTPUTF8"), OK);
        CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), OK);
        CHECK_EQ(here.client.ask("DATA").substr(0, 3), std::string("354"));
        here.client.say(body + "\r\n.\r\n");
        CHECK_EQ(here.client.answer(), it.told);
        CHECK_EQ(here.up.messages.size(), it.told == TAKEN ? 1u : 0u);
        if (it.told == TAKEN)
            CHECK_EQ(here.up.messages[0].mailfrom,
                     "MAIL FROM:<a@client.test> BODY=8BITMIME SMTPUTF8 SIZE=" +
                         std::to_string(here.up.messages[0].data.size() + 4));   // its lines end with CR LF
        here.finish();
    });
}

// Its channels know nothing of an upstream: each message goes by a connection of its own.
TEST(relay, a_proxy_with_plain_channels) {
    struct plain : smtpd::PureProxy {
        using PureProxy::PureProxy;
        std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                          const asyncore::address& from) override {
            return SMTPServer::channel_class(std::move(conn), from);
        }
    };
    for (const bool use_poll : {false, true}) {
        scene_with<plain> here(use_poll);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.up.script["RCPT"] = {says(NO)};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), SO_FAR + NO);
        here.finish();
        CHECK_EQ(here.up.heard.size(), 2u);
    }
}

TEST(relay, deliver_several_copies) {
    filtered here;
    here.server.process = [](filter& it, const auto&, const auto& from, const auto& to, auto&& data,
                             const auto& kwargs) {
        // To an archive first; then to whom it is for. The client hears of the first that fails.
        const auto reply = kwargs.defer();
        const std::string copy = data;
        it._deliver(from, {"archive@example"}, copy, [&it, from, to, copy, reply](const smtpd::reply& archived) {
            if (archived.code != 250) return reply.answer("451 not archived");
            it._deliver(from, to, copy, [reply](const smtpd::reply& said) { reply.answer(said.line()); });
        });
        return std::nullopt;
    };
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.up.messages.size(), 2u);
    CHECK_EQ(here.up.messages[0].data, here.up.messages[1].data);
    CHECK_EQ(here.up.messages[0].data, std::string("Subject: tagged-1\n\nHello\n"));
    here.up.script["end"] = {says(NO)};
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), SO_FAR + "451 not archived");
    here.finish();
}

TEST(relay, a_filter_decides_later) {
    filtered here;
    std::vector<std::function<void()>> later;
    here.server.process = [&later](filter& it, const auto&, const auto& from, const auto& to, auto&& data,
                                   const auto& kwargs) {
        const auto reply = kwargs.defer();
        later.push_back([&it, from, to, message = data, reply] {
            it._deliver(from, to, message, [reply](const smtpd::reply& said) { reply.answer(said.line()); });
        });
        return std::nullopt;
    };
    here.client.ask("MAIL FROM:<a@client.test>");
    here.client.ask("RCPT TO:<b@example>");
    here.client.ask("DATA");
    here.client.say(body + "\r\n.\r\nNOOP\r\n");
    here.run_until([&] { return later.size() == 1; });
    here.settle();
    CHECK_EQ(here.client.received, std::string());
    later[0]();
    CHECK_EQ(here.client.answer(), TAKEN);
    CHECK_EQ(here.client.answer(), OK);
    // The client does not wait for it.
    here.client.ask("MAIL FROM:<a@client.test>");
    here.client.ask("RCPT TO:<b@example>");
    here.client.ask("DATA");
    here.client.say(body + "\r\n.\r\n");
    here.run_until([&] { return later.size() == 2; });
    here.client.close();
    here.settle();
    later[1]();
    here.run_until([&] { return here.up.messages.size() == 2; });
    here.wait_until_upstream_is_left();
}

// The transaction stays open for it; when the client has been sent away, the message goes all the same.
TEST(relay, a_filter_passes_later) {
    for (const bool stopped : {false, true}) {
        filtered here;
        std::function<void()> later;
        here.server.process = [&later](filter& it, const auto& peer, const auto& from, const auto& to, auto&& data,
                                       const auto& kwargs) {
            later = [&it, peer, from, to, message = std::move(data), kwargs, reply = kwargs.defer()]() mutable {
                it.pass(peer, from, to, std::move(message), kwargs);
            };
            return std::nullopt;
        };
        here.client.ask("MAIL FROM:<a@client.test>");
        here.client.ask("RCPT TO:<b@example>");
        here.client.ask("DATA");
        here.client.say(body + "\r\n.\r\n");
        here.run_until([&] { return later != nullptr; });
        if (stopped) {
            here.server.stop(milliseconds(1));
            here.client.wait_for_close();
        }
        later();
        later = nullptr;
        if (stopped) {
            // The grace is over, and the client was not told 250.
            here.run_until([&] { return here.map.size() == 1; });
        } else {
            CHECK_EQ(here.client.answer(), TAKEN);
            here.finish();
        }
        CHECK_EQ(here.up.accepted("tagged-1"), stopped ? 0u : 1u);
    }
}

TEST(relay, the_server_goes_with_a_delivery_in_hand) {
    for (const std::string at : {"greeting", "EHLO", "MAIL", "RCPT", "DATA", "end"}) {
        smtpd::options with;
        with.upstream.quit = milliseconds(10);
        filtered here(false, with);
        here.server.process = [](filter& it, const auto&, const auto& from, const auto& to, auto&& data,
                                 const auto& kwargs) {
            it._deliver(from, to, std::move(data),
                        [reply = kwargs.defer()](const smtpd::reply& said) { reply.answer(said.line()); });
            return std::nullopt;
        };
        here.client.ask("MAIL FROM:<a@client.test>");
        here.client.ask("RCPT TO:<b@example>");
        here.client.ask("DATA");
        here.up.script[at] = {says("250 fine").when_released()};
        here.client.say(body + "\r\n.\r\n");
        here.wait_until_held();
        here.owned.reset();
        here.client.wait_for_close();
        CHECK(here.client.received.empty() || here.client.received.substr(0, 3) == "451");
        here.wait_until_upstream_is_left();
        here.run_until([&] { return here.map.size() == 1; });
    }
}

// A delivery is nobody's channel's; it ends with the grace all the same. So does a farewell that is not answered.
TEST(relay, stop_ends_deliveries_and_farewells) {
    for (const std::string at : {"greeting", "EHLO", "MAIL", "RCPT", "DATA", "end", "QUIT"}) {
        filtered here;
        std::string told;
        here.server.process = [&](filter& it, const auto&, const auto& from, const auto& to, auto&& data, const auto&) {
            it._deliver(from, to, std::move(data), [&](const smtpd::reply& said) { told = said.line(); });
            return std::nullopt;
        };
        here.client.ask("MAIL FROM:<a@client.test>");
        here.client.ask("RCPT TO:<b@example>");
        here.client.ask("DATA");
        here.up.always[at] = says_nothing();
        const auto silent = [&] { return here.up.heard.size() == 2 && (at == "QUIT" ? told == TAKEN : true); };
        CHECK_EQ(here.client.ask(body + "\r\n."), OK);
        here.run_until(silent);
        const auto start = asyncore::clock::now();
        here.server.stop(milliseconds(50));
        here.run_until([&] { return here.map.size() == 1; });
        CHECK(asyncore::clock::now() - start < std::chrono::seconds(4));   // QUIT alone may take 5
        CHECK_EQ(told, at == "QUIT" ? TAKEN : "the server is shutting down");
        const auto& last = here.up.heard[1];
        CHECK((!last.empty() && last.back() == "QUIT") == (at == "QUIT"));
    }
}

TEST(relay, nothing_begins_after_the_grace) {
    filtered here;
    here.server.stop(milliseconds(0));
    std::string told;
    here.server._deliver("a@client.test", {"b@example"}, body, [&](const smtpd::reply& said) { told = said.line(); });
    here.run_until([&] { return here.map.size() == 1; });
    CHECK_EQ(told, "the server is shutting down");
    CHECK_EQ(here.up.messages.size(), 0u);
}

// Deviation 50
TEST(relay, a_proxy_that_would_send_to_itself_says_so) {
    const auto check = [](const asyncore::address& here, asyncore::address there, bool same_port) {
        asyncore::map_type map;
        smtpd::options with;
        with.map = &map;
        with.fqdn = "mx.test";
        smtpd::PureProxy proxy(here, {}, with);
        if (there.family != AF_UNIX) there.port = proxy.socket->getsockname().port + (same_port ? 0 : 1);
        proxy._remoteaddr = there;
        try {
            proxy.check_settings();
        } catch (const std::invalid_argument& error) {
            CHECK_EQ(std::string(error.what()), "it would send to itself: " + there.str());
            return true;
        }
        return false;
    };
    for (const auto& [listens, sends] : {std::pair<const char*, const char*>{"127.0.0.1", "127.0.0.1"},
                                         {"localhost", "localhost"},
                                         {"127.0.0.1", "::ffff:127.0.0.1"},
                                         {"127.0.0.1", "0.0.0.0"},
                                         {"0.0.0.0", "127.0.0.1"},
                                         {"0.0.0.0", "127.1.2.3"},
                                         {"0.0.0.0", "0.0.0.0"},
                                         {"0.0.0.0", "localhost"},
                                         {"::", "127.0.0.1"},
                                         {"::", "::1"},
                                         {"::", "::ffff:127.0.0.1"},
                                         {"::1", "::1"},
                                         {"::1", "::"}}) {
        if (std::string(listens).find(':') != std::string::npos && !has_ipv6()) continue;
        CHECK_EQ(std::string(listens) + " " + sends + (check({listens, 0}, {sends, 0}, true) ? "" : " is fine"),
                 std::string(listens) + " " + sends);
        CHECK(!check({listens, 0}, {sends, 0}, false));
    }
    for (const auto& [listens, sends] : {std::pair<const char*, const char*>{"127.0.0.1", "127.0.0.2"},
                                         {"127.0.0.1", "192.0.2.1"},
                                         {"0.0.0.0", "192.0.2.1"},
                                         {"0.0.0.0", "no-such-name.invalid"},
                                         {"127.0.0.1", "no-such-name.invalid"}})
        CHECK(!check({listens, 0}, {sends, 0}, true));
    const std::string path = "/tmp/smtpd-self-" + std::to_string(::getpid());
    ::unlink(path.c_str());
    CHECK(check(asyncore::address::unix_path(path), asyncore::address::unix_path(path), true));
    ::unlink(path.c_str());
    CHECK(!check(asyncore::address::unix_path(path), asyncore::address::unix_path(path + ".other"), true));
    ::unlink(path.c_str());
    CHECK(!check(asyncore::address::unix_path(path), {"127.0.0.1", 25}, true));
    ::unlink(path.c_str());
}

// ---------------------------------------------------------------------------------------------------------
// Many clients
// ---------------------------------------------------------------------------------------------------------

TEST(relay, a_hundred_clients_at_once) {
    for (const bool use_poll : {false, true}) {
        scene here(use_poll);
        here.up.always["end"] = says("250 2.0.0 message ok").when_released();
        std::vector<std::unique_ptr<caller>> clients;
        for (int i = 0; i < 100; ++i) {
            clients.push_back(std::make_unique<caller>(here.map, here.server.socket->getsockname(), use_poll));
            clients.back()->say(
                "EHLO client.test\r\nMAIL FROM:<a@client.test>\r\nRCPT TO:<b@example>\r\nDATA\r\n"
                "Subject: tagged-" +
                std::to_string(i) + "-\r\n\r\nHello\r\n.\r\nQUIT\r\n");
        }
        // The upstream has all the messages, and has answered none.
        here.wait_until_held(100);
        CHECK_EQ(here.up.messages.size(), 100u);
        here.settle();
        // Another server in the same loop is as quick as ever.
        support::recorder other(here.map);
        caller local(here.map, other.socket->getsockname(), use_poll);
        local.answer();
        local.ask("EHLO client.test");
        CHECK_EQ(local.mail("<a@client.test>", {"b@example"}, body), OK + " / " + OK + " / 354 / " + OK);
        CHECK_EQ(here.up.held(), 100u);
        for (const auto& it : clients) {
            here.run_until([&] { return it->received.find(END_DATA) != std::string::npos; });
            CHECK(it->received.find("2.0.0") == std::string::npos);
        }
        while (here.up.held() > 0) here.up.release();
        for (const auto& it : clients) {
            it->wait_for_close();
            CHECK_EQ(it->received.substr(it->received.find("354 ")), END_DATA + TAKEN + "\r\n221 Bye\r\n");
        }
        for (int i = 0; i < 100; ++i) CHECK_EQ(here.up.accepted("tagged-" + std::to_string(i) + "-"), 1u);
        here.wait_until_upstream_is_left();
    }
}

TEST(relay, a_slow_upstream_slows_only_its_own) {
    const std::vector<moment> all = moments();
    for (const auto& it : all) {
        if (it.held.empty()) continue;
        scene here;
        reach(here, it);
        caller second(here.map, here.server.socket->getsockname());
        second.answer();
        second.ask("EHLO client.test");
        CHECK_EQ(second.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        CHECK_EQ(here.up.held(), 1u);
        here.up.release();
        second.close();
        here.client.close();
        here.wait_until_upstream_is_left();
    }
}

// Replies come one by one: each would wait for the client's acknowledgement of the one before.
TEST(relay, no_reply_waits_for_an_acknowledgement) {
    scene_with<support::nameless<smtpd::PureProxy>> it;
    CHECK(it.server.channel->conn->getsockopt(IPPROTO_TCP, TCP_NODELAY) != 0);
    it.finish();
}
