// SMTP, LMTP and sendmail(): the client's side, alone.

#include "dialog.hpp"
#include "scene.hpp"

using namespace scenes;

namespace {

// A session with an upstream in the same loop.
template <typename Session = smtpd::SMTP>
struct talk_with {
    asyncore::map_type map;
    upstream up{map};
    Session session;
    std::vector<std::string> told;   // the answers, in order: "250 OK", "-1 the connection was closed"

    explicit talk_with(const smtpd::timeouts& wait = {}) : session(&map, wait) {}

    smtpd::SMTP::handler keep() {
        return [this](const smtpd::reply& answer) { told.push_back((answer.code < 0 ? "-1 " : "") + answer.line()); };
    }
    void run_until(const std::function<bool()>& done) { support::run_until(map, done); }
    // Waits for the next answer.
    std::string next() {
        run_until([this] { return !told.empty(); });
        const std::string first = told.front();
        told.erase(told.begin());
        return first;
    }
    std::string connect() {
        session.connect(up.where(), keep());
        return next();
    }
    std::string ehlo() {
        session.ehlo(keep());
        return next();
    }
    std::string say(const std::string& cmd) {
        session.docmd(cmd, keep());
        return next();
    }
    void leave() {
        session.quit();
        run_until([this] { return up.open() == 0 && !session.connected; });
        up.check();
    }
};
using talk = talk_with<>;

// What sendmail() does: "" or the recipients it returns, or the answer that it throws.
std::string outcome(upstream& up, const std::vector<std::string>& to,
                    const std::string& message = "Subject: x\n\nHello\n", const std::string& from = "a@client.test") {
    try {
        std::string refused;
        for (const auto& [recipient, why] : smtpd::sendmail(up.where(), from, to, message))
            refused += (refused.empty() ? "" : ", ") + recipient + ": " + why.line();
        return refused;
    } catch (const smtpd::SMTPResponseException& error) {
        CHECK_EQ(std::string(error.what()), error.answer.line());
        return "throws " + std::string(error.answer.code < 0 ? "-1 " : "") + error.what();
    }
}

const std::string NO = "550 5.1.1 never";
const std::string NOT_NOW = "450 4.2.1 not now";

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// sendmail()
// ---------------------------------------------------------------------------------------------------------

TEST(sendmail, sends_and_leaves) {
    upstream_thread it;
    CHECK_EQ(outcome(it.up, {"b@example", "c@example"}, "Subject: x\n\nHello\n.\n..\r\nlast"), std::string());
    it.join();
    it.up.check();
    CHECK_EQ(it.up.conversation(0),
             std::string("EHLO [127.0.0.1] / MAIL FROM:<a@client.test> SIZE=32 / RCPT TO:<b@example> / "
                         "RCPT TO:<c@example> / DATA / (message) / QUIT"));
    CHECK_EQ(it.up.messages.at(0).wire, std::string("Subject: x\r\n\r\nHello\r\n..\r\n...\r\nlast\r\n"));
}

TEST(sendmail, an_empty_sender_and_an_empty_message) {
    upstream_thread it;
    CHECK_EQ(outcome(it.up, {"b@example"}, "", ""), std::string());
    it.join();
    CHECK_EQ(it.up.messages.at(0).mailfrom.substr(0, 12), std::string("MAIL FROM:<>"));
    CHECK_EQ(it.up.messages.at(0).wire, std::string());
}

TEST(sendmail, each_way_to_fail) {
    struct row {
        std::string name;   // the stage
        act what;
        std::string told;
    };
    const std::vector<row> rows{
        {"greeting", says("554 5.7.1 no service"), "throws 554 5.7.1 no service"},
        {"greeting", says("421 4.3.2 later"), "throws 421 4.3.2 later"},
        {"greeting", sends("250 hello\r\n"), "throws -1 the answer makes no sense"},
        {"greeting", hangs_up(), "throws -1 the connection was closed"},
        {"MAIL", says(NO), "throws " + NO},
        {"MAIL", says("421 4.3.2 later"), "throws 421 4.3.2 later"},
        {"RCPT", says(NO), "throws " + NO},
        {"RCPT", hangs_up(), "throws -1 the connection was closed"},
        {"DATA", says(NOT_NOW), "throws " + NOT_NOW},
        {"DATA", sends("250 fine\r\n"), "throws -1 the answer makes no sense"},
        {"end", says(NO), "throws " + NO},
        {"end", says("451-4.3.0 try\r\n451 4.3.0 later"), "throws 451-4.3.0 try\r\n451 4.3.0 later"},
        {"end", says("421 4.3.2 later"), "throws 421 4.3.2 later"},
        {"end", says("250 fine").then_hangs_up(), ""},
        {"end", hangs_up(), "throws -1 the connection was closed"},
        {"end", sends("250 fine\r\n421 4.3.2 later\r\n"), ""},
        {"QUIT", resets(), ""}};
    std::string failures;
    for (const auto& row : rows) {
        upstream_thread it([&](upstream& up) { up.always[row.name] = row.what; });
        const std::string told = outcome(it.up, {"b@example"});
        it.join();
        if (told != row.told) failures += "\n  " + row.name + ", not " + row.told + ": " + told;
        if ((told.empty() ? 1u : 0u) != it.up.accepted("Hello")) failures += "\n  " + row.name + ": the message";
    }
    if (!failures.empty()) throw test::failure(failures);
}

TEST(sendmail, recipients_that_are_refused) {
    upstream_thread it([](upstream& up) {
        up.always["RCPT TO:<no@example>"] = says(NO);
        up.always["RCPT TO:<later@example>"] = says(NOT_NOW);
        up.always["RCPT TO:<forward@example>"] = says("251 will forward");
    });
    CHECK_EQ(outcome(it.up, {"b@example", "no@example", "later@example", "forward@example"}),
             "later@example: " + NOT_NOW + ", no@example: " + NO);
    CHECK_EQ(outcome(it.up, {"no@example", "later@example"}), "throws " + NOT_NOW);
    CHECK_EQ(outcome(it.up, {"no@example", "no@example"}), "throws " + NO);
    CHECK_EQ(outcome(it.up, {}), std::string("throws 554 Error: no recipients"));
    it.join();
    it.up.check();
    CHECK_EQ(it.up.messages.size(), 1u);
    CHECK_EQ(it.up.messages[0].rcpttos.size(), 2u);
}

TEST(sendmail, HELO_when_there_is_no_EHLO) {
    upstream_thread it([](upstream& up) { up.always["EHLO"] = says("502 5.5.1 what?"); });
    CHECK_EQ(outcome(it.up, {"b@example"}), std::string());
    it.join();
    it.up.check();
    CHECK_EQ(it.up.conversation(0), std::string("EHLO [127.0.0.1] / HELO [127.0.0.1] / MAIL FROM:<a@client.test> / "
                                                "RCPT TO:<b@example> / DATA / (message) / QUIT"));
}

TEST(sendmail, neither_EHLO_nor_HELO) {
    upstream_thread it([](upstream& up) {
        up.always["EHLO"] = says("502 5.5.1 what?");
        up.always["HELO"] = says(NO);
    });
    CHECK_EQ(outcome(it.up, {"b@example"}), "throws " + NO);
    it.join();
    it.up.check();
}

TEST(sendmail, line_ends_and_NUL_in_an_address_are_an_error_of_the_caller) {
    upstream_thread it;
    for (const std::string& bad :
         {std::string("\r\nRSET"), std::string("\n"), std::string("\r"), std::string(1, '\0')}) {
        CHECK_THROWS(outcome(it.up, {"b@example"}, "x", "a@x" + bad), std::invalid_argument);
        CHECK_THROWS(outcome(it.up, {"b@example", "c@x" + bad}, "x"), std::invalid_argument);
    }
    it.join();
    CHECK_EQ(it.up.messages.size(), 0u);
}

TEST(sendmail, nobody_there) {
    upstream_thread it([](upstream& up) { up.refuse(); });
    CHECK_EQ(outcome(it.up, {"b@example"}).substr(0, 9), std::string("throws -1"));
    CHECK_THROWS(smtpd::sendmail({"999.999.999.999", 25}, "a@client.test", {"b@example"}, "x"),
                 smtpd::SMTPResponseException);
    CHECK_THROWS(smtpd::sendmail({}, "a@client.test", {"b@example"}, "x"), smtpd::SMTPResponseException);
}

TEST(sendmail, waits_no_longer_than_it_is_told) {
    for (const std::string stage : {"greeting", "MAIL", "DATA", "end"}) {
        upstream_thread it([&](upstream& up) { up.always[stage] = says_nothing(); });
        smtpd::timeouts wait;
        wait.greeting = wait.command = wait.data_initiation = wait.data_termination = wait.quit = milliseconds(50);
        CHECK_THROWS(smtpd::sendmail(it.up.where(), "a@client.test", {"b@example"}, "x", wait),
                     smtpd::SMTPResponseException);
    }
}

// ---------------------------------------------------------------------------------------------------------
// SMTP
// ---------------------------------------------------------------------------------------------------------

TEST(smtplib, a_session_by_hand) {
    talk it;
    bool closed = false;
    it.session.on_close = [&] { closed = true; };
    CHECK_EQ(it.connect(), std::string("220 upstream ready"));
    CHECK_EQ(it.say("NOOP"), std::string("502 5.5.1 what?"));
    CHECK_EQ(it.ehlo().substr(0, 12), std::string("250-upstream"));
    it.session.mail("a@client.test", {"SIZE=10", "BODY=8BITMIME"}, it.keep());
    CHECK_EQ(it.next(), std::string("250 2.1.0 sender ok"));
    it.session.rcpt("b@example", it.keep());
    CHECK_EQ(it.next(), std::string("250 2.1.5 recipient ok"));
    it.session.data("Hello\n", it.keep());
    CHECK_EQ(it.next(), TAKEN);
    it.session.rset(it.keep());
    CHECK_EQ(it.next(), std::string("250 2.0.0 reset"));
    it.leave();
    CHECK(closed);
    CHECK_EQ(it.up.conversation(0),
             std::string("NOOP / EHLO [127.0.0.1] / MAIL FROM:<a@client.test> SIZE=10 BODY=8BITMIME "
                         "/ RCPT TO:<b@example> / DATA / (message) / RSET / QUIT"));
}

// The last piece of a message would wait for an answer otherwise, which may take its time.
TEST(smtplib, no_packet_waits_for_an_answer) {
    talk_with<> it;
    CHECK_EQ(it.connect(), std::string("220 upstream ready"));
    CHECK(it.session.socket->getsockopt(IPPROTO_TCP, TCP_NODELAY) != 0);
}

TEST(smtplib, features) {
    talk it;
    it.session.local_hostname = "me.test";
    it.up.extensions = {"SIZE 33554432", "8bitmime", "AUTH PLAIN LOGIN", "AUTH=LOGIN", "X-Empty ", "SMTPUTF8"};
    it.connect();
    CHECK(!it.session.does_esmtp);
    it.ehlo();
    CHECK(it.session.does_esmtp);
    CHECK(it.session.has_extn("8BITMIME"));
    CHECK(it.session.has_extn("SMTPUTF8"));
    CHECK(it.session.has_extn("X-EMPTY"));
    CHECK(!it.session.has_extn("UPSTREAM"));
    CHECK_EQ(it.session.esmtp_features["SIZE"], std::string("33554432"));
    it.up.script["EHLO"] = {says("502 5.5.1 what?")};
    it.session.ehlo_or_helo_if_needed(it.keep());
    CHECK_EQ(it.next(), std::string("250 upstream"));
    CHECK(!it.session.does_esmtp);
    CHECK(!it.session.has_extn("SIZE"));
    it.leave();
    CHECK_EQ(it.up.conversation(0), std::string("EHLO me.test / EHLO me.test / HELO me.test / QUIT"));
}

TEST(smtplib, a_greeting_other_than_220_is_a_refusal) {
    struct row {
        std::string greeting, told;
    };
    for (const auto& [greeting, told] :
         {row{"554 5.7.1 no", "554 5.7.1 no"}, row{"421 4.3.2 later", "421 4.3.2 later"}, row{"450 later", "450 later"},
          row{"250 hello", "-1 the answer makes no sense"}, row{"354 go", "-1 the answer makes no sense"}}) {
        talk it;
        it.up.always["greeting"] = says(greeting);
        CHECK_EQ(it.connect(), told);
        it.session.quit();
        it.run_until([&] { return it.up.open() == 0; });
    }
}

TEST(smtplib, answers_of_any_form) {
    struct row {
        std::string bytes, told;
    };
    const std::string senseless = "-1 the answer makes no sense", lost = "-1 the connection was closed";
    for (const auto& [bytes, told] : {row{"250 ok\r\n", "250 ok"},
                                      row{"250 ok\n", "250 ok"},
                                      row{"250\r\n", "250"},
                                      row{"250 \r\n", "250"},
                                      row{"250-a\r\n250-\r\n250 b\r\n", "250-a\r\n250-\r\n250 b"},
                                      row{"250-a\r\n250\r\n", "250-a\r\n250"},
                                      row{"299 x\r\n", "299 x"},
                                      row{"300 x\r\n", "300 x"},
                                      row{"599 x\r\n", "599 x"},
                                      row{"600 x\r\n", senseless},
                                      row{"199 x\r\n", senseless},
                                      row{"25 x\r\n", senseless},
                                      row{"2500 x\r\n", senseless},
                                      row{"250-a\r\n251 b\r\n", senseless},
                                      row{"\r\n", senseless},
                                      row{"ok\r\n", senseless},
                                      row{std::string("250 a\0b\x1b[2J\x7f!\r\n", 15), "250 a b [2J !"},
                                      row{"250 a\tb\r\n", "250 a\tb"},
                                      row{"250 \xc3\xa4\r\n", "250 \xc3\xa4"},
                                      row{"250 ok\r\n250 ok\r\n", "-1 there are more answers than commands"},
                                      row{"250 ok\r\n2", "-1 there are more answers than commands"}}) {
        talk it;
        it.connect();
        it.up.script["XTRA"] = {sends(bytes)};
        CHECK_EQ(it.say("XTRA"), told);
    }
    talk it;
    it.connect();
    it.up.script["XTRA"] = {sends("250-a\r\n").then_hangs_up()};
    CHECK_EQ(it.say("XTRA"), lost);
    CHECK_EQ(it.say("XTRA"), std::string("-1 not connected"));
}

TEST(smtplib, long_answers) {
    struct row {
        std::string bytes;
        bool fine;
    };
    const std::string line(100, 'x');
    std::string many;
    for (int i = 0; i < 10; ++i) many += "250-" + line + "\r\n";
    for (const auto& [bytes, fine] :
         {row{"250 " + std::string(60, 'x') + "\r\n", true}, row{"250 " + line + line + "\r\n", false},
          row{"250 " + line + line, false}, row{many + "250 end\r\n", false}, row{many, false},
          row{many.substr(0, 300) + "\r\n250 end\r\n", true}}) {
        talk it;
        it.connect();
        it.session.maxline = 110;
        it.session.maxreply = 500;
        it.up.script["XTRA"] = {sends(bytes)};
        const std::string told = it.say("XTRA");
        CHECK_EQ(told.substr(0, 3), std::string(fine ? "250" : "-1 "));
        if (!fine) CHECK_EQ(told, std::string("-1 the answer is too long"));
        CHECK_EQ(it.session.connected, fine);
    }
}

TEST(smtplib, one_command_at_a_time) {
    talk it;
    it.session.connect(it.up.where(), it.keep());
    CHECK_THROWS(it.session.connect(it.up.where(), it.keep()), std::logic_error);
    CHECK_EQ(it.next().substr(0, 3), std::string("220"));
    it.session.docmd("NOOP", it.keep());
    CHECK_THROWS(it.session.docmd("NOOP", it.keep()), std::logic_error);
    CHECK_EQ(it.next().substr(0, 3), std::string("502"));
    // The next one may be said while the answer is given.
    it.session.docmd("NOOP", [&](const smtpd::reply&) { it.session.docmd("NOOP", it.keep()); });
    CHECK_EQ(it.next().substr(0, 3), std::string("502"));
    it.leave();
    CHECK_EQ(it.up.conversation(0), std::string("NOOP / NOOP / NOOP / QUIT"));
}

TEST(smtplib, commands_may_not_have_line_ends) {
    talk it;
    it.connect();
    for (const std::string& bad :
         {std::string("\r\nRSET"), std::string("\n"), std::string("\r"), std::string(1, '\0')}) {
        CHECK_THROWS(it.session.docmd("NOOP" + bad, it.keep()), std::invalid_argument);
        CHECK_THROWS(it.session.mail("a" + bad, {}, it.keep()), std::invalid_argument);
        CHECK_THROWS(it.session.mail("a", {"SIZE=1" + bad}, it.keep()), std::invalid_argument);
        CHECK_THROWS(it.session.rcpt("b" + bad, it.keep()), std::invalid_argument);
        CHECK_THROWS(it.session.sendmail("a" + bad, {"b"}, "x", {}, true, nullptr), std::invalid_argument);
    }
    CHECK(it.told.empty());
    CHECK_EQ(it.say("NOOP").substr(0, 3), std::string("502"));
    it.leave();
    CHECK_EQ(it.up.conversation(0), std::string("NOOP / QUIT"));
}

TEST(smtplib, quit_at_any_time) {
    {   // before anything
        talk it;
        it.session.quit();
        CHECK(!it.session.connected);
    }
    {   // while connecting
        talk it;
        it.session.connect(it.up.where(), it.keep());
        it.session.quit();
        CHECK_EQ(it.next().substr(0, 2), std::string("-1"));
    }
    {   // while an answer is owed: it is given first
        talk it;
        it.connect();
        it.up.script["MAIL"] = {says("250 fine").when_released()};
        it.session.mail("a@client.test", {}, it.keep());
        it.run_until([&] { return it.up.held() == 1; });
        it.session.quit();
        CHECK_EQ(it.up.conversation(0), std::string("MAIL FROM:<a@client.test>"));
        it.up.release();
        CHECK_EQ(it.next(), std::string("250 fine"));
        it.run_until([&] { return it.up.open() == 0; });
        it.up.check();
        CHECK_EQ(it.up.conversation(0), std::string("MAIL FROM:<a@client.test> / QUIT"));
    }
    {   // and nobody answers
        smtpd::timeouts wait;
        wait.quit = milliseconds(10);
        talk it(wait);
        it.connect();
        it.up.always["QUIT"] = says_nothing();
        it.session.quit();
        it.run_until([&] { return it.up.open() == 0; });
        CHECK(it.told.empty());
    }
    {   // in the middle of a message: there is none then
        talk it;
        it.connect();
        it.up.script["body"] = {sends("").when_released()};
        it.session.mail("a@client.test", {}, it.keep());
        it.next();
        it.session.rcpt("b@example", it.keep());
        it.next();
        it.session.data("Hello\n" + std::string(8 << 20, 'x'), it.keep());
        it.run_until([&] { return it.up.held() == 1; });
        it.session.quit();
        CHECK_EQ(it.next().substr(0, 2), std::string("-1"));
        it.run_until([&] { return it.up.open() == 0; });
        CHECK_EQ(it.up.messages.size(), 0u);
    }
}

TEST(smtplib, forget_calls_nobody) {
    talk it;
    bool closed = false;
    it.session.on_close = [&] { closed = true; };
    it.connect();
    it.up.script["MAIL"] = {says("250 fine").when_released()};
    it.session.mail("a@client.test", {}, it.keep());
    it.run_until([&] { return it.up.held() == 1; });
    it.session.forget();
    it.session.quit();
    it.up.release();
    it.run_until([&] { return it.up.open() == 0; });
    it.up.check();
    CHECK(it.told.empty());
    CHECK(!closed);
}

TEST(smtplib, a_session_that_goes_says_so) {
    asyncore::map_type map;
    upstream up(map);
    int closed = 0;
    std::vector<int> codes;
    {
        smtpd::SMTP session(&map);
        session.on_close = [&] { ++closed; };
        session.connect(up.where(), [&](const smtpd::reply& answer) { codes.push_back(answer.code); });
        support::run_until(map, [&] { return codes.size() == 1; });
    }
    CHECK_EQ(closed, 1);
    support::run_until(map, [&] { return up.open() == 0; });
    CHECK_EQ(codes.size(), 1u);
}

TEST(smtplib, a_session_owned_by_its_map) {
    asyncore::map_type map;
    upstream up(map);
    auto session = std::make_unique<smtpd::SMTP>(&map);
    smtpd::SMTP& it = *session;
    smtpd::reply result;
    bool done = false;
    it.connect(up.where(), [&](const smtpd::reply&) {
        it.ehlo([&](const smtpd::reply&) {
            it.sendmail("a@client.test", {"b@example"}, "Hello\n", {}, false,
                        [&](const smtpd::reply& answer, const smtpd::SMTP::refused&) {
                            result = answer;
                            done = true;
                            it.close();   // its own, while it calls
                        });
        });
    });
    map.own(std::move(session));
    support::run_until(map, [&] { return done; });
    CHECK_EQ(result.line(), TAKEN);
    CHECK_EQ(map.size() - up.open(), 1u);
}

namespace {

// What a server of ours is told by EHLO at this address.
std::string greeted(const asyncore::address& where) {
    asyncore::map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    support::nameless<smtpd::SMTPServer> server(where, {}, with);
    smtpd::SMTP session(&map);
    int code = 0;
    session.connect(server.socket->getsockname(), [&](const smtpd::reply& greeting) {
        CHECK_EQ(greeting.code, 220);
        session.ehlo([&](const smtpd::reply& answer) { code = answer.code; });
    });
    support::run_until(map, [&] { return code != 0; });
    CHECK_EQ(code, 250);
    return server.channel->seen_greeting;
}

}   // namespace

TEST(smtplib, how_it_calls_itself_with_ipv6) {
    if (!support::has_ipv6()) SKIP("no IPv6");
    CHECK_EQ(greeted({"::1", 0}), "[IPv6:::1]");
}

TEST(smtplib, how_it_calls_itself) {
    CHECK_EQ(greeted({"127.0.0.1", 0}), "[127.0.0.1]");
    const std::string path = "/tmp/smtpd-test-" + std::to_string(::getpid()) + ".sock";
    ::unlink(path.c_str());
    CHECK_EQ(greeted(asyncore::address::unix_path(path)), "localhost");
    ::unlink(path.c_str());
    // Nobody is there any more, which is known at once.
    talk it;
    it.session.connect(asyncore::address::unix_path(path), it.keep());
    CHECK_EQ(it.told.size(), 1u);
    CHECK_EQ(it.next().substr(0, 11), "-1 connect:");
    CHECK_EQ(it.session._fileno, -1);
}

TEST(smtplib, a_timeout_that_is_for_ever) {
    smtpd::timeouts wait;
    wait.connect = wait.greeting = wait.command = wait.quit = milliseconds::max();
    talk it(wait);
    CHECK_EQ(it.connect(), std::string("220 upstream ready"));
    CHECK_EQ(it.ehlo().substr(0, 12), std::string("250-upstream"));
    it.leave();
}

TEST(smtplib, what_needs_a_connection_that_is_gone) {
    talk it;
    it.session.data("Hello\n", it.keep());
    CHECK_EQ(it.next(), std::string("-1 not connected"));
}

// Each command, before there is a connection and after it has gone.
TEST(smtplib, commands_without_a_connection) {
    for (const bool lost : {false, true}) {
        talk it;
        if (lost) {
            it.connect();
            it.up.hang_up();
            it.run_until([&] { return !it.session.connected; });
        }
        auto& session = it.session;
        const auto whole = [&](const smtpd::reply& answer, const smtpd::SMTP::refused&) { it.keep()(answer); };
        session.docmd("NOOP", it.keep());
        session.ehlo(it.keep());
        session.helo(it.keep());
        session.ehlo_or_helo_if_needed(it.keep());
        session.mail("a@client.test", {}, it.keep());
        session.rcpt("b@example", it.keep());
        session.data("Hello\n", it.keep());
        session.rset(it.keep());
        session.sendmail("a@client.test", {"b@example"}, "Hello\n", {}, false, whole);
        session.sendmail("\xc3\xa4@client.test", {"b@example"}, "Hello\n", {"SMTPUTF8"}, false, whole);
        CHECK_EQ(it.told.size(), 10u);
        for (const auto& told : it.told) CHECK_EQ(told, std::string("-1 not connected"));
        session.quit();
        session.abandon();
    }
}

TEST(smtplib, a_handler_that_is_null) {
    talk it;
    auto& session = it.session;
    const smtpd::SMTP::handler null;
    const std::vector<std::function<void()>> methods{
        [&] { session.connect(it.up.where(), null); },
        [&] { session.open(it.up.where(), null); },
        [&] { session.docmd("NOOP", null); },
        [&] { session.ehlo(null); },
        [&] { session.helo(null); },
        [&] { session.ehlo_or_helo_if_needed(null); },
        [&] { session.mail("a@client.test", {}, null); },
        [&] { session.rcpt("b@example", null); },
        [&] { session.data("Hello\n", null); },
        [&] { session.rset(null); },
        [&] { session.sendmail("a", {"b"}, "Hello\n", {}, false, nullptr); }};
    const auto try_all = [&] {
        for (std::size_t i = it.session.connected ? 2 : 0; i < methods.size(); ++i) {
            bool thrown = false;
            try {
                methods[i]();
            } catch (const std::invalid_argument&) {
                thrown = true;
            }
            CHECK_EQ(std::to_string(i) + (thrown ? "" : " throws nothing"), std::to_string(i));
        }
    };
    try_all();
    CHECK_EQ(it.connect(), std::string("220 upstream ready"));
    try_all();
    it.ehlo();
    try_all();
    it.leave();
    CHECK_EQ(it.up.conversation(0), std::string("EHLO [127.0.0.1] / QUIT"));
}

TEST(smtplib, connect_without_a_handler) {
    talk it;
    asyncore::dispatcher& plain = it.session;
    plain.connect(it.up.where());
    it.run_until([&] { return it.up.heard.size() == 1; });
    for (int i = 0; i < 5; ++i) asyncore::poll(0.01, &it.map);
    CHECK_EQ(it.ehlo().substr(0, 12), std::string("250-upstream"));
    it.leave();
}

TEST(smtplib, open_goes_as_far_as_EHLO) {
    struct row {
        std::string stage, told, conversation;
        act what;
    };
    for (const auto& row : {row{"greeting", "554 no", "", says("554 no")},
                            row{"greeting", "-1 the connection was closed", "", hangs_up()},
                            row{"EHLO", "250 upstream", "EHLO [127.0.0.1] / HELO [127.0.0.1]", says("502 what?")},
                            row{"EHLO", "421 bye", "EHLO [127.0.0.1]", says("421 bye")}}) {
        talk it;
        it.up.script[row.stage] = {row.what};
        it.session.open(it.up.where(), it.keep());
        CHECK_EQ(it.next(), row.told);
        CHECK_EQ(it.up.conversation(0), row.conversation);
    }
}

// An idle session has all the time that its server gives it.
TEST(smtplib, no_clock_runs_between_two_commands) {
    smtpd::timeouts wait;
    wait.command = wait.greeting = wait.connect = milliseconds(300);
    talk it(wait);
    it.connect();
    it.ehlo();
    CHECK(it.session.deadline() == asyncore::clock::time_point::max());
    const auto until = asyncore::clock::now() + milliseconds(400);
    while (asyncore::clock::now() < until) asyncore::poll(0.05, &it.map);
    CHECK_EQ(it.say("NOOP"), std::string("502 5.5.1 what?"));
    it.leave();
}

// While a message is sent, each piece that the server takes starts data_block's clock anew; then it is
// data_termination's.
TEST(smtplib, the_clocks_of_a_message) {
    smtpd::timeouts wait;
    wait.data_initiation = std::chrono::minutes(1);
    wait.data_block = std::chrono::minutes(2);
    wait.data_termination = std::chrono::minutes(60);
    asyncore::map_type map;
    auto ends = support::wire::pair();
    support::wire& server = ends.first;
    smtpd::SMTP session(&map, wait);
    session.set_socket(std::move(ends.second), &map);
    session.connected = true;
    std::string told;
    session.data(std::string(4 << 20, 'x'), [&](const auto& answer) { told = answer.line(); });
    const auto left = [&] { return session.deadline() - asyncore::clock::now(); };
    CHECK(left() <= wait.data_initiation);
    CHECK_EQ(support::wait_for(map, server, "\r\n"), std::string("DATA\r\n"));
    server.send("354 go on\r\n");
    support::run_until(map, [&] { return left() > wait.data_initiation; });
    for (int pass = 0; pass < 5; ++pass) asyncore::poll(0.0, &map);   // until there is no more room
    const auto first = session.deadline();
    for (int pass = 0; pass < 5; ++pass) asyncore::poll(0.0, &map);
    CHECK(session.deadline() == first);   // nothing is taken
    std::size_t taken = 0;
    const auto take = [&] {
        server.receive();
        taken += server.take().size();
        return session.deadline() != first;
    };
    support::run_until(map, take);
    CHECK(session.deadline() > first);
    CHECK(left() <= wait.data_block);
    support::run_until(map, [&] {
        take();
        return taken == (4 << 20) + 5;
    });
    CHECK(left() > wait.data_block);
    server.send("250 taken\r\n");
    support::run_until(map, [&] { return !told.empty(); });
    CHECK_EQ(told, std::string("250 taken"));
    CHECK(session.deadline() == asyncore::clock::time_point::max());
}

// A server that takes no more of it.
TEST(smtplib, a_message_that_gets_stuck) {
    smtpd::timeouts wait;
    wait.data_block = milliseconds(25);
    asyncore::map_type map;
    auto ends = support::wire::pair();
    support::wire& server = ends.first;
    smtpd::SMTP session(&map, wait);
    session.set_socket(std::move(ends.second), &map);
    session.connected = true;
    std::string told;
    session.data(std::string(4 << 20, 'x'), [&](const auto& answer) { told = answer.line(); });
    CHECK_EQ(support::wait_for(map, server, "\r\n"), std::string("DATA\r\n"));
    server.send("354 go on\r\n");
    support::run_until(map, [&] { return !told.empty(); });
    CHECK_EQ(told, std::string("no answer in time"));
    CHECK(!session.connected);
}

// QUIT that has waited for the answer to the command under way waits no longer for its own than any other.
TEST(smtplib, a_late_QUIT_that_is_not_answered) {
    smtpd::timeouts wait;
    wait.quit = milliseconds(1000);
    talk it(wait);
    it.connect();
    it.up.script["NOOP"] = {says("250 ok").when_released()};
    it.up.always["QUIT"] = says_nothing();
    it.session.docmd("NOOP", it.keep());
    it.run_until([&] { return it.up.held() == 1; });
    it.session.quit();
    it.up.release();
    it.run_until([&] { return it.up.conversation(0) == "NOOP / QUIT"; });
    CHECK_EQ(it.told.size(), 1u);
    CHECK(it.session.deadline() <= asyncore::clock::now() + wait.quit);
    it.run_until([&] { return !it.session.connected; });
}

// QUIT can't be said: the session ends all the same.
TEST(smtplib, a_session_that_can_not_say_QUIT_does_not_stay) {
    struct mute : smtpd::SMTP {
        using SMTP::SMTP;
        bool dumb = false;
        std::size_t send(std::string_view data) override {
            if (dumb) throw std::bad_alloc();
            return SMTP::send(data);
        }
    };
    smtpd::timeouts wait;
    wait.quit = milliseconds(10);
    talk_with<mute> it(wait);
    it.connect();
    it.ehlo();
    it.session.dumb = true;
    it.session.abandon();
    CHECK(it.session.deadline() <= asyncore::clock::now() + wait.quit);
    it.session.ignore_log_types = {"error", "warning"};
    it.run_until([&] { return !it.session.connected; });
}

// A session may connect again, whatever was left of the connection before.
TEST(smtplib, connected_again) {
    for (const std::string left : {"250-first\r\n", "25", ""}) {
        talk with;
        with.up.script["EHLO client"] = {left.empty() ? says("250 fine") : sends(left).then_hangs_up()};
        CHECK_EQ(with.connect().substr(0, 4), std::string("220 "));
        with.say("EHLO client");
        if (left.empty()) with.session.quit();
        with.run_until([&] { return !with.session.connected; });
        CHECK_EQ(with.connect().substr(0, 4), std::string("220 "));
        CHECK_EQ(with.say("RSET").substr(0, 4), std::string("250 "));
        with.session.quit();
        with.run_until([&] { return with.up.open() == 0; });
    }
}

// What on_close throws does not leave without an answer who waits for one.
TEST(smtplib, on_close_that_throws) {
    talk it;
    it.connect();
    it.up.always["NOOP"] = hangs_up();
    it.session.on_close = [] { throw std::runtime_error("the fault of on_close"); };
    support::captured out(std::cout);
    CHECK_EQ(it.say("NOOP"), std::string("-1 the connection was closed"));
    CHECK(out.text().find("the fault of on_close") != std::string::npos);
    for (const bool exits : {false, true}) {   // a destructor throws nothing
        smtpd::SMTP session(&it.map);
        session.on_close = [exits] {
            if (exits) throw asyncore::ExitNow();
            throw std::runtime_error("too late");
        };
    }
}

// Destroyed while it waits for an answer, it says that it has ended, and no more.
TEST(smtplib, destroyed_while_an_answer_is_awaited) {
    asyncore::map_type map;
    upstream up(map);
    up.always["NOOP"] = says_nothing();
    auto session = std::make_unique<smtpd::SMTP>(&map);
    bool ready = false, answered = false, closed = false;
    session->on_close = [&] { closed = true; };
    session->open(up.where(), [&](const smtpd::reply&) { ready = true; });
    support::run_until(map, [&] { return ready; });
    session->docmd("NOOP", [&](const smtpd::reply&) { answered = true; });
    support::run_until(map, [&] { return up.heard[0].size() == 2; });
    session.reset();
    CHECK(closed);
    CHECK(!answered);
    support::run_until(map, [&] { return up.open() == 0; });
}

// Deviation 52
TEST(smtplib, SMTPUTF8_where_an_address_needs_it) {
    const std::string A = "\xc3\xa4@client.test", B = "\xc3\xbc@example";
    for (const bool offered : {true, false}) {
        talk it;
        if (offered) it.up.extensions = {"SMTPUTF8"};
        it.connect();
        it.ehlo();
        const auto outcome_of = [&](const std::string& from, const std::vector<std::string>& to,
                                    const std::vector<std::string>& options) {
            it.session.sendmail(from, to, "Hello\n", options, false,
                                [&](const smtpd::reply& answer, const auto&) { it.keep()(answer); });
            return it.next();
        };
        const std::string needed = offered ? TAKEN : "550 Error: SMTPUTF8 is not supported by the next server";
        CHECK_EQ(outcome_of("a@client.test", {"b@example"}, {}), TAKEN);
        CHECK_EQ(outcome_of(A, {"b@example"}, {}), needed);
        CHECK_EQ(outcome_of(A, {"b@example"}, {"SMTPUTF8"}), needed);
        CHECK_EQ(outcome_of("a@client.test", {"b@example", B}, {}), needed);
        it.leave();
        std::size_t declared = 0;
        for (const auto& line : it.up.heard[0])
            if (line.substr(0, 4) == "MAIL") declared += line.find(" SMTPUTF8") != line.npos;
        CHECK_EQ(declared, offered ? 3u : 0u);
    }
    upstream_thread other;
    CHECK_EQ(outcome(other.up, {B}), std::string("throws 550 Error: SMTPUTF8 is not supported by the next server"));
    other.join();
    upstream_thread able([](upstream& up) { up.extensions = {"SMTPUTF8"}; });
    CHECK_EQ(outcome(able.up, {B}), std::string());
    able.join();
    CHECK_EQ(able.up.messages.at(0).mailfrom, std::string("MAIL FROM:<a@client.test> SMTPUTF8"));
}

TEST(sendmail, any_yes_to_the_message_is_one) {
    upstream_thread it([](upstream& up) { up.always["end"] = says("252 2.0.0 kept"); });
    CHECK_EQ(outcome(it.up, {"b@example"}), std::string());
    it.join();
}

TEST(smtplib, SMTPUTF8_that_is_not_offered) {
    talk it;
    it.connect();
    it.ehlo();
    it.session.sendmail("\xc3\xa4@client.test", {"b@example"}, "Hello\n", {"SMTPUTF8"}, false,
                        [&](const smtpd::reply& answer, const auto&) { it.keep()(answer); });
    CHECK_EQ(it.next(), std::string("550 Error: SMTPUTF8 is not supported by the next server"));
    it.leave();
    CHECK_EQ(it.up.conversation(0), std::string("EHLO [127.0.0.1] / QUIT"));
}

// What is thrown by those whom a session calls ends that session, and no other; ExitNow ends the loop.
TEST(smtplib, a_handler_that_throws) {
    struct row {
        std::string name;
        bool refused;              // the connection; otherwise the handler of the greeting throws
        bool exits;                // with ExitNow
        bool at_the_end = false;   // on_close throws as well, or rather
    };
    for (const auto& row :
         {row{"greeting", false, false}, row{"greeting", false, true}, row{"refused", true, false},
          row{"refused", true, true}, row{"close", false, false, true}, row{"close", false, true, true}}) {
        talk it;
        if (row.refused) it.up.refuse();
        int calls = 0;
        const auto fail = [&] {
            ++calls;
            if (row.exits) throw asyncore::ExitNow();
            throw std::runtime_error("a handler's fault");
        };
        if (row.at_the_end) it.session.on_close = fail;
        support::captured out(std::cout);
        bool left = false;
        try {
            it.session.connect(it.up.where(), [&](const smtpd::reply&) {
                if (row.at_the_end) throw std::runtime_error("the first");
                fail();
            });
            it.run_until([&] { return calls > 0 && it.session._fileno < 0; });
        } catch (const asyncore::ExitNow&) {
            left = true;
        }
        CHECK_EQ(row.name + " " + std::to_string(calls), row.name + " 1");
        CHECK_EQ(left, row.exits);
        if (row.name == "greeting" && !row.exits) CHECK(out.text().find("a handler's fault") != std::string::npos);
        if (row.at_the_end) CHECK(out.text().find("the first") != std::string::npos);
    }
}

TEST(smtplib, a_name) {
    talk it;
    support::upstream named(it.map, "127.0.0.1");
    it.session.connect({"localhost", named.port()}, it.keep());   // ::1 may come first, and refuse
    CHECK_EQ(it.next(), std::string("220 upstream ready"));
    it.leave();
    named.check();
}

// ---------------------------------------------------------------------------------------------------------
// LMTP
// ---------------------------------------------------------------------------------------------------------

TEST(lmtp, the_worst_answer_counts) {
    struct row {
        std::string name;
        std::vector<std::string> answers;
        std::string told;
    };
    const std::string YES = "250 2.0.0 message ok";
    const std::vector<row> rows{{"all", {YES, YES, YES}, YES},
                                {"4xx first", {NOT_NOW, YES, YES}, NOT_NOW},
                                {"4xx last", {YES, YES, NOT_NOW}, NOT_NOW},
                                {"5xx", {YES, NO, YES}, NO},
                                {"4xx over 5xx", {NOT_NOW, NO, YES}, NOT_NOW},
                                {"4xx over 5xx, later", {NO, NOT_NOW, YES}, NOT_NOW},
                                {"none", {NO, NO, NO}, NO},
                                {"421", {YES, "421 4.3.2 later", YES}, "421 4.3.2 later"}};
    for (const auto& row : rows) {
        for (const bool slow : {false, true}) {
            talk_with<smtpd::LMTP> it;
            it.up.lmtp = true;
            std::vector<std::string> to;
            for (const auto& answer : row.answers) {
                to.push_back("r" + std::to_string(to.size()) + "@example");
                it.up.script["end " + to.back()] = {slow ? says(answer).slowly() : says(answer)};
            }
            it.connect();
            it.session.ehlo_or_helo_if_needed(it.keep());
            it.next();
            it.session.sendmail("a@client.test", to, "Hello\n", {}, false,
                                [&](const smtpd::reply& answer, const smtpd::SMTP::refused&) { it.keep()(answer); });
            const std::string told = it.next();
            if (told != row.told) throw test::failure(row.name + (slow ? ", slowly: " : ": ") + told);
            it.session.quit();
            it.run_until([&] { return it.up.open() == 0; });
            CHECK_EQ(it.up.heard[0][0], std::string("LHLO [127.0.0.1]"));
        }
    }
}

TEST(lmtp, only_accepted_recipients_are_answered_for) {
    talk_with<smtpd::LMTP> it;
    it.up.lmtp = true;
    it.up.always["RCPT TO:<no@example>"] = says(NO);
    it.connect();
    it.ehlo();
    for (int round = 0; round < 2; ++round) {
        smtpd::SMTP::refused refused;
        it.session.sendmail("a@client.test", {"b@example", "no@example", "c@example"}, "Hello\n", {}, false,
                            [&](const smtpd::reply& answer, const smtpd::SMTP::refused& some) {
                                refused = some;
                                it.keep()(answer);
                            });
        CHECK_EQ(it.next(), TAKEN);
        CHECK_EQ(refused.size(), 1u);
    }
    it.leave();
    CHECK_EQ(it.up.messages.size(), 2u);
}

TEST(lmtp, there_is_no_HELO) {
    talk_with<smtpd::LMTP> it;
    it.up.script["LHLO"] = {says("502 5.5.1 what?")};
    it.connect();
    it.session.ehlo_or_helo_if_needed(it.keep());
    CHECK_EQ(it.next(), std::string("502 5.5.1 what?"));
    it.leave();
    CHECK_EQ(it.up.conversation(0), std::string("LHLO [127.0.0.1] / QUIT"));
}

TEST(lmtp, an_answer_that_is_missing) {
    smtpd::timeouts wait;
    for (const act& what : {hangs_up(), sends("what\r\n"), says("250 fine").then_hangs_up()}) {
        talk_with<smtpd::LMTP> it(wait);
        it.up.lmtp = true;
        it.up.script["end b@example"] = {what};
        it.up.script["end c@example"] = {hangs_up()};
        it.connect();
        it.ehlo();
        it.session.sendmail("a@client.test", {"b@example", "c@example"}, "Hello\n", {}, false,
                            [&](const smtpd::reply& answer, const smtpd::SMTP::refused&) { it.keep()(answer); });
        CHECK_EQ(it.next().substr(0, 2), std::string("-1"));
    }
}
