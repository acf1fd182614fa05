// PureProxy in front of a server that follows a script, and the client that it speaks with. See upstream.hpp.

#include "scene.hpp"
#include "test.hpp"

using namespace scenes;

namespace {

// ---------------------------------------------------------------------------------------------------------
// Every fault at every stage
// ---------------------------------------------------------------------------------------------------------

using limit = std::chrono::milliseconds smtpd::timeouts::*;

struct fault {
    std::string name;
    act what;
    std::string told;   // what the client hears at that stage; "": all goes well
    bool times_out = false;
};

struct stage {
    std::string name;
    std::string good;     // the answer that is expected there
    std::string before;   // what the client has been told by then
    limit wait;
};

const std::string body = "Subject: tagged-1\r\n\r\nHello";

std::vector<fault> faults(const stage& at) {
    const std::string code = at.good.substr(0, 3), &good = at.good;
    const std::string long_line(10 << 20, 'x');
    // More answers than commands: of those to the message the first one counts, before it they are nonsense.
    const auto surplus = [&at](fault it) {
        if (at.name != "end") it.told = NOT_AVAILABLE;
        return it;
    };
    std::string many_lines;
    while (many_lines.size() < 10 << 20) many_lines += code + "-and so on and so on and so on and so on and so on\r\n";
    return {
        {"4xx", says("450 4.3.0 not now"), "450 4.3.0 not now"},
        {"4xx in several lines", says("450-4.3.0 not\r\n450 4.3.0 now"), "450-4.3.0 not\r\n450 4.3.0 now"},
        {"4xx without a text", says("450"), "450"},
        {"4xx, then it closes", says("450 4.3.0 not now").then_hangs_up(), "450 4.3.0 not now"},
        {"5xx", says("550 5.1.1 never"), "550 5.1.1 never"},
        {"5xx byte by byte", says("550 5.1.1 never").slowly(), "550 5.1.1 never"},
        {"421", says("421 4.3.2 shutting down"), NOT_AVAILABLE},
        {"421, then it closes", says("421 4.3.2 shutting down").then_hangs_up(), NOT_AVAILABLE},
        {"it closes", hangs_up(), NOT_AVAILABLE},
        {"it resets", resets(), NOT_AVAILABLE},
        {"silence", says_nothing(), NOT_AVAILABLE, true},
        {"half an answer, then it closes", sends(good).then_hangs_up(), NOT_AVAILABLE},
        {"half of several lines, then it closes", sends(code + "-a\r\n" + code).then_hangs_up(), NOT_AVAILABLE},
        {"half of several lines, then silence", sends(code + "-a\r\n"), NOT_AVAILABLE, true},
        {"a line of 10 MiB", sends(long_line), NOT_AVAILABLE},
        {"a line of 10 MiB with a code", sends(good + long_line + "\r\n"), NOT_AVAILABLE},
        {"lines of 10 MiB in all", sends(many_lines), NOT_AVAILABLE},
        {"no digits", sends("hello\r\n"), NOT_AVAILABLE},
        {"an empty line", sends("\r\n"), NOT_AVAILABLE},
        {"1xx", sends("150 a moment\r\n"), NOT_AVAILABLE},
        {"6xx", sends("650 what\r\n"), NOT_AVAILABLE},
        {"0xx", sends("000 what\r\n"), NOT_AVAILABLE},
        {"two digits", sends(code.substr(0, 2) + " OK\r\n"), NOT_AVAILABLE},
        {"four digits", sends(code + "0 OK\r\n"), NOT_AVAILABLE},
        {"a blank before the digits", sends(" " + good + "\r\n"), NOT_AVAILABLE},
        {"a NUL before the digits", sends(std::string(1, '\0') + good + "\r\n"), NOT_AVAILABLE},
        {"lines with different codes", sends(code + "-a\r\n550 b\r\n"), NOT_AVAILABLE},
        surplus({"two answers", sends(good + "\r\n" + good + "\r\n"), good}),
        surplus({"an answer and a half", sends(good + "\r\n" + code), good}),
        surplus({"a yes and 421", sends(good + "\r\n421 4.3.2 shutting down\r\n"), good}),
        surplus({"a yes and a no", sends(good + "\r\n550 5.1.1 never\r\n"), good}),
        surplus({"a no and a yes", sends("550 5.1.1 never\r\n" + good + "\r\n"), "550 5.1.1 never"}),
        surplus({"4xx and a yes", sends("450 4.3.0 not now\r\n" + good + "\r\n"), "450 4.3.0 not now"}),
        {"byte by byte", says(good).slowly(), ""},
        {"several lines", says(code + "-a\r\n" + good), ""},
        {"several lines byte by byte", says(code + "-a\r\n" + good).slowly(), ""},
        {"no text", says(code), ""},
        {"a line that ends with LF alone", sends(good + "\n"), ""},
    };
}

// The client sends a message while the upstream fails at one stage; when it has been told so, it tries again.
void run_fault(const stage& at, const fault& it, bool use_poll, std::map<std::string, std::deque<act>> script,
               milliseconds wait) {
    smtpd::options with;
    with.upstream.*at.wait = wait;
    scene here(use_poll, with);
    here.up.script = std::move(script);
    here.up.script[at.name].push_back(it.what);
    const bool at_end = at.name == "end";
    // The upstream's 250 is one, whether it can be read or not.
    const std::size_t taken = at_end && it.what.bytes.substr(0, 3) == "250" &&
                                      (it.told.substr(0, 3) == "250" || it.name == "a line of 10 MiB with a code")
                                  ? 1
                                  : 0;
    const std::string told = here.client.mail("<a@client.test>", {"b@example"}, body);
    if (it.told.empty()) {
        if (at_end)
            CHECK_EQ(told.substr(0, at.before.size() + 3), at.before + "250");
        else
            CHECK_EQ(told, RELAYED);
        CHECK_EQ(here.up.accepted("tagged-1"), 1u);
        CHECK_EQ(here.up.heard.size(), 1u);
        return here.finish();
    }
    CHECK_EQ(told, at.before + it.told);
    CHECK_EQ(here.up.accepted("tagged-1"), taken);
    CHECK_EQ(it.told.substr(0, 3) == "250", taken == 1 && it.told != NOT_AVAILABLE);
    here.server.settings.upstream = {};
    // A refused recipient does not end the transaction.
    if (at.name == "RCPT" && it.told != NOT_AVAILABLE) CHECK_EQ(here.client.ask("RSET"), OK);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    CHECK_EQ(here.up.accepted("tagged-1"), taken + 1);
    here.finish();
}

void run_fault(const stage& at, const fault& it, bool use_poll,
               const std::map<std::string, std::deque<act>>& script = {}) {
    if (!it.times_out) return run_fault(at, it, use_poll, script, milliseconds(60000));
    with_timeout([&](milliseconds wait) { run_fault(at, it, use_poll, script, wait); });
}

const stage GREETING{"greeting", "220 ready", "", &smtpd::timeouts::greeting};
const stage EHLO{"EHLO", "250 upstream", "", &smtpd::timeouts::command};
const stage HELO{"HELO", "250 upstream", "", &smtpd::timeouts::command};
const stage MAIL{"MAIL", "250 fine", "", &smtpd::timeouts::command};
const stage RCPT{"RCPT", "250 fine", OK + " / ", &smtpd::timeouts::command};
const stage DATA{"DATA", "354 go", OK + " / " + OK + " / 354 / ", &smtpd::timeouts::data_initiation};
const stage END{"end", "250 fine", OK + " / " + OK + " / 354 / ", &smtpd::timeouts::data_termination};

void run_faults(const stage& at, std::vector<fault> more = {}) {
    auto rows = faults(at);
    rows.insert(rows.end(), more.begin(), more.end());
    each(rows, [&](const fault& it, bool use_poll) { run_fault(at, it, use_poll); });
}

}   // namespace

// Deviation 39
TEST(proxy, faults_at_the_greeting) {
    run_faults(GREETING, {{"250", sends("250 hello\r\n"), NOT_AVAILABLE},
                          {"354", sends("354 hello\r\n"), NOT_AVAILABLE},
                          {"221", sends("221 hello\r\n"), NOT_AVAILABLE},
                          {"the answer to EHLO comes with it", sends("220 ready\r\n250 hello\r\n"), NOT_AVAILABLE}});
}

TEST(proxy, faults_at_EHLO) {
    auto rows = faults(EHLO);
    // A server that doesn't know EHLO, or doesn't want it, is asked with HELO.
    for (auto& it : rows)
        if (it.told.substr(0, 2) == "45" && it.told != NOT_AVAILABLE && it.what.then == act::stay) it.told.clear();
    for (auto& it : rows)
        if (it.told.substr(0, 2) == "55") it.told.clear();
    for (auto& it : rows)
        if (it.name == "4xx, then it closes") it.told = NOT_AVAILABLE;
    rows.push_back({"354", sends("354 hello\r\n"), ""});
    rows.push_back({"251", sends("251 hello\r\n"), ""});
    each(rows, [&](const fault& it, bool use_poll) { run_fault(EHLO, it, use_poll); });
}

TEST(proxy, faults_at_HELO) {
    auto rows = faults(HELO);
    rows.push_back({"354", sends("354 hello\r\n"), NOT_AVAILABLE});
    rows.push_back({"251", sends("251 hello\r\n"), NOT_AVAILABLE});
    each(rows, [&](const fault& it, bool use_poll) {
        run_fault(HELO, it, use_poll, {{"EHLO", {says("502 5.5.1 what?")}}});
    });
}

TEST(proxy, faults_at_MAIL) {
    run_faults(MAIL, {{"354", sends("354 go\r\n"), NOT_AVAILABLE},
                      {"251", sends("251 fine\r\n"), NOT_AVAILABLE},
                      {"252", sends("252 fine\r\n"), NOT_AVAILABLE},
                      {"220", sends("220 fine\r\n"), NOT_AVAILABLE},
                      {"the answer to RCPT comes with it", sends("250 fine\r\n550 never\r\n"), NOT_AVAILABLE}});
}

// Deviation 34
TEST(proxy, faults_at_RCPT) {
    run_faults(RCPT, {{"251", says("251 will forward"), ""},
                      {"354", sends("354 go\r\n"), NOT_AVAILABLE},
                      {"252", says("252 perhaps"), NOT_AVAILABLE},
                      {"220", sends("220 fine\r\n"), NOT_AVAILABLE},
                      {"the answer to DATA comes with it", sends("250 fine\r\n354 go\r\n"), NOT_AVAILABLE}});
}

TEST(proxy, faults_at_DATA) {
    run_faults(DATA, {{"250", sends("250 fine\r\n"), NOT_AVAILABLE},
                      {"251", sends("251 fine\r\n"), NOT_AVAILABLE},
                      {"220", sends("220 fine\r\n"), NOT_AVAILABLE},
                      {"the answer to the message comes with it", sends("354 go\r\n250 fine\r\n"), NOT_AVAILABLE}});
}

TEST(proxy, faults_in_the_message) {
    // Much more than the sockets hold, so that the upstream speaks while there is a lot left to send.
    const std::string big = body + "\r\n" + std::string(6 << 20, 'x');
    const std::vector<fault> rows = {
        {"it closes", hangs_up(), NOT_AVAILABLE},
        {"it resets", resets(), NOT_AVAILABLE},
        {"552", says("552 5.3.4 too big"), "552 5.3.4 too big"},
        {"452", says("452 4.3.1 no room"), "452 4.3.1 no room"},
        {"421", says("421 4.3.2 shutting down"), NOT_AVAILABLE},
        {"250", sends("250 fine\r\n"), NOT_AVAILABLE},
        {"nonsense", sends("hello\r\n"), NOT_AVAILABLE},
    };
    each(rows, [&](const fault& it, bool use_poll) {
        scene here(use_poll);
        here.up.script["body"] = {it.what};
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, big), END.before + it.told);
        CHECK_EQ(here.up.messages.size(), 0u);
        CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
        here.finish();
    });
}

TEST(proxy, faults_at_the_end_of_the_message) {
    run_faults(END, {{"it closes after its 250", says("250 fine").then_hangs_up(), ""},
                     {"354", sends("354 go\r\n"), NOT_AVAILABLE},
                     {"251", says("251 fine"), ""},
                     {"252", says("252 fine"), ""},
                     {"220", says("220 fine"), ""}});
}

// ---------------------------------------------------------------------------------------------------------
// The answer to a message
// ---------------------------------------------------------------------------------------------------------

TEST(proxy, an_answer_that_is_there_before_the_next_pass) {
    // The upstream has a loop of its own, and answers while the proxy is busy elsewhere.
    for (const bool use_poll : {false, true}) {
        asyncore::map_type ours, theirs;
        upstream up(theirs);
        smtpd::PureProxy server({"127.0.0.1", 0}, up.where(), scene::prepared(ours, {}));
        caller client(ours, server.socket->getsockname(), use_poll);
        const auto both = [&] {
            use_poll ? asyncore::poll2(0.001, &ours) : asyncore::poll(0.001, &ours);
            for (int i = 0; i < 3; ++i) asyncore::poll(0.001, &theirs);
        };
        client.say("EHLO client.test\r\nMAIL FROM:<a@client.test>\r\nRCPT TO:<b@example>\r\nDATA\r\n" + body +
                   "\r\n.\r\n");
        for (int i = 0; i < 1000 && client.received.find(TAKEN) == std::string::npos; ++i) {
            both();
            if (client.received.find("451") != std::string::npos) break;
        }
        CHECK_EQ(up.accepted("tagged-1"), 1u);
        CHECK_EQ(client.received.substr(client.received.find("354")),
                 "354 End data with <CR><LF>.<CR><LF>\r\n" + TAKEN + "\r\n");
        client.close();
        for (int i = 0; i < 1000 && up.open() > 0; ++i) both();
        up.check();
    }
}

namespace {

// Gives each message another sender, so that it goes by a connection of its own.
struct rewriting_proxy : smtpd::PureProxy {
    using PureProxy::PureProxy;
    std::vector<std::string> recipients{"c@example"};
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string&,
                                               const std::vector<std::string>&, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        return PureProxy::process_message(peer, "rewritten@mx.test", recipients, std::move(data), kwargs);
    }
};

}   // namespace

TEST(proxy, a_message_of_its_own_connection_needs_a_220) {
    scene_with<rewriting_proxy> here;
    CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), OK);
    CHECK_EQ(here.client.ask("RCPT TO:<b@example>"), OK);
    CHECK_EQ(here.client.ask("DATA").substr(0, 3), std::string("354"));
    here.up.script["greeting"] = {sends("250 hello\r\n")};
    here.client.say(body + "\r\n.\r\n");
    CHECK_EQ(here.client.answer(), NOT_AVAILABLE);
    CHECK_EQ(here.up.messages.size(), 0u);
    here.finish();
}

TEST(proxy, a_greeting_of_250_for_ever) {
    scene here;
    here.up.always["greeting"] = sends("250 hello\r\n");
    CHECK_EQ(here.client.ask("MAIL FROM:<a@client.test>"), NOT_AVAILABLE);
    CHECK_EQ(here.up.heard.size(), 1u);
    here.finish();
}

TEST(proxy, a_rewritten_message_without_recipients) {
    scene_with<rewriting_proxy> here;
    here.server.recipients.clear();
    const std::string told = here.client.mail("<a@client.test>", {"b@example"}, body);
    CHECK_EQ(told.substr(0, END.before.size()), END.before);
    CHECK(told.substr(END.before.size(), 3) != "250");
    CHECK_EQ(here.up.messages.size(), 0u);
    here.finish();
}

TEST(proxy, an_upstream_timeout_of_0_is_none) {
    smtpd::options with;
    with.upstream.connect = with.upstream.greeting = with.upstream.command = {};
    with.upstream.data_initiation = with.upstream.data_block = with.upstream.data_termination = {};
    scene here(false, with);
    CHECK_EQ(here.client.mail("<a@client.test>", {"b@example"}, body), RELAYED);
    here.finish();
}
