// Where we differ from CPython, row by row of the Deviations table: our exact bytes.

#include <sys/resource.h>
#include <unistd.h>

#include <thread>

#include "dialog.hpp"
#include "test.hpp"

using asyncore::map_type;
using support::captured;
using support::list;
using support::session;
using support::told;
using support::wire;
using namespace std::chrono_literals;

namespace {

const std::string DATA_START = "354 End data with <CR><LF>.<CR><LF>";
const std::string BANNER = support::banner("");
const std::string MAIL_SYNTAX = "501 Syntax: MAIL FROM: <address> [SP <mail-parameters>]";
const std::string RCPT_SYNTAX = "501 Syntax: RCPT TO: <address> [SP <mail-parameters>]";
const std::string EHLO = "250-\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250 HELP";

// A pass, of either kind.
void pass(map_type& map, bool use_poll, double timeout = 0.0) {
    use_poll ? asyncore::poll2(timeout, &map) : asyncore::poll(timeout, &map);
}

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------------------------------------

// Deviation 1
TEST(deviations, malformed_address) {
    session it;
    it.line("EHLO a", EHLO);
    const std::string malformed[] = {"<",       "<a@", "a@",     "<a@>", "<a@[1.2.3.4>", "\"",
                                     "<\"",     "<@",  "<@x",    "<@x>", "<,>",          "@",
                                     "<a@b@c>", ">",   "<a@b.>", "(",    "(a\\",         "<@a,(x)"};
    for (const auto& address : malformed) {
        it.line("MAIL FROM:" + address, MAIL_SYNTAX);
        it.line("VRFY " + address, "501 Syntax: VRFY <address>");
    }
    it.line("MAIL FROM:<a@b>", "250 OK");
    for (const auto& address : malformed) it.line("RCPT TO:" + address, RCPT_SYNTAX);
    it.line("RCPT TO:<c@d>", "250 OK");
    CHECK_EQ(list(it.channel().rcpttos), "['c@d']");
    it.client.end();
}

// Deviation 1
TEST(deviations, malformed_parameters) {
    session it;
    it.line("EHLO a", EHLO);
    for (const std::string param : {"SIZE", "SIZE=", "SIZE=-1", "SIZE=+1", "SIZE=0x10", "SIZE=1.0", "SIZE=\u0663",
                                    "SIZE=\u00b2", "SIZ\u00c9=1", "=1", "=", "A_B=1", "BODY="})
        it.line("MAIL FROM:<a@b> " + param, MAIL_SYNTAX);
    it.line("MAIL FROM:<a@b> BODY", "501 Error: BODY can only be one of 7BIT, 8BITMIME");
    // A number of any length is a number.
    it.line("MAIL FROM:<a@b> SIZE=" + std::string(40, '9'),
            "552 Error: message size exceeds fixed maximum message size");
    it.line("MAIL FROM:<a@b> SIZE=" + std::string(40, '0') + "1", "250 OK");
    it.client.end();
}

// Deviation 2
TEST(deviations, command_bytes) {
    session it;
    const std::string bad = "500 Error: bad syntax", too_long = "500 Error: line too long";
    it.lines({{"\xff", bad},
              {"NOOP \xc3", bad},
              {"HELO \x80", bad},
              {"MAIL FROM:<\xe9@b>", bad},
              {"VRFY \xed\xa0\x80", bad},       // a surrogate
              {"NOOP \xf4\x90\x80\x80", bad},   // beyond Unicode
              {"NOOP \xc0\x80", bad},           // NUL, the long way
              {"NOOP \xe0\x9f\xbf", bad},
              {"NOOP \xf0\x8f\xbf\xbf", bad},
              {"NOOP \xf5\x80\x80\x80", bad},
              {"NOOP \xe2\x82", bad},   // cut off
              {"NOOP \xf0\x9f\x92", bad},
              {"NOOP \xe2(\xa1", bad},   // or broken
              {"NOOP \xf0\x9f\x92(", bad},
              {"NOOP \u0080\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff", "501 Syntax: NOOP"},
              {"N\u00d3OP", bad},
              {"no\u0131p", bad},   // a letter whose upper case is ASCII
              {"NOOP\u00a0", bad},
              {std::string(513, '\xff'), too_long},   // that as well
              {"NOOP " + std::string(600, '\xff'), too_long},
              {"noop", "250 OK"},
              {"EHLO a", EHLO},
              {"NOOP " + std::string(508, '\xff'), bad}});   // beyond its own limit, within MAIL's
    it.client.end();
}

// Deviation 47
TEST(deviations, what_would_end_a_domain_literal) {
    session it;
    it.line("EHLO a", EHLO);
    for (const std::string literal : {"\\>", "\\<", "\\[", "\\]", "\\\\", "x>y", "<", "\\]\\>", " \\[ ", "1\\]2"}) {
        for (const std::string local : {"a", "\"a b\"", "(c) a . b", "\"@[\""}) {
            it.line("MAIL FROM:<" + local + "@[" + literal + "]>", MAIL_SYNTAX);
            it.line("MAIL FROM:" + local + "@[" + literal + "]", MAIL_SYNTAX);
            it.line("VRFY " + local + "@(c)[" + literal + "]", "501 Syntax: VRFY <address>");
        }
        it.line("MAIL FROM:<@r:a@[" + literal + "]>", MAIL_SYNTAX);
    }
    // A route is not sent on, and what is quoted in a local part stays so.
    for (const auto& [address, is] : {std::pair<std::string, std::string>("@[\\>]:a@[1.2]", "a@[1.2]"),
                                      {"a@[\\I\\Pv6:::1]", "a@[IPv6:::1]"},
                                      {"a@[]", "a@[]"},
                                      {"\"@[\\\\]\"@b", "\"@[\\\\]\"@b"},
                                      {"\"<@[x]>\"@[y]", "\"<@[x]>\"@[y]"}}) {
        it.line("MAIL FROM:<" + address + ">", "250 OK");
        CHECK_EQ(it.channel().mailfrom, is);
        it.line("RSET", "250 OK");
    }
    it.client.end();
}

// Deviation 3
TEST(deviations, encoded_words) {
    session it;
    it.line("EHLO a", EHLO);
    const std::string words[] = {"=?utf-8?q?a=0d=0ab?=@x", "=?utf-8?b?DQo=?=@x", "=?us-ascii?q?a?=@x"};
    for (const auto& word : words) {
        it.line("MAIL FROM:<" + word + ">", "250 OK");
        CHECK_EQ(it.channel().mailfrom, word);
        it.line("RCPT TO:<" + word + ">", "250 OK");
        CHECK_EQ(it.channel().rcpttos.at(0), word);
        it.line("RSET", "250 OK");
    }
    it.client.end();
}

// Deviation 4
TEST(deviations, control_characters) {
    session it;
    it.line("EHLO a", EHLO);
    for (const char control : {'\0', '\x01', '\a', '\b', '\t', '\n', '\v', '\f', '\r', '\x1b', '\x1f', '\x7f'}) {
        const std::string c(1, control);
        it.line("MAIL FROM:<\"a" + c + "b\"@c>", MAIL_SYNTAX);
        if (control == '\t') continue;   // elsewhere it is white space, as in Python
        it.line("MAIL FROM:<a" + c + "b@c>", MAIL_SYNTAX);
        it.line("MAIL FROM:a" + c + "b@c", MAIL_SYNTAX);
        it.line("MAIL FROM:<a@b> SIZE=1" + c + "BODY=7BIT", MAIL_SYNTAX);
        it.line("VRFY a" + c + "b", "501 Syntax: VRFY <address>");
    }
    it.line("MAIL FROM:<a@b> SIZE=1\tBODY=7BIT", "250 OK");
    it.line(std::string("RCPT TO:<c\0d@e>", 15), RCPT_SYNTAX);
    it.line("RCPT TO:<c@d\re>", RCPT_SYNTAX);
    CHECK(it.channel().rcpttos.empty());
    it.client.end();
}

// Deviation 7
TEST(deviations, after_quit) {
    session it;
    CHECK_EQ(it.say("NOOP\r\nHELO a\r\nQUIT\r\nNOOP\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n"),
             "250 OK\r\n250 \r\n221 Bye\r\n");
    CHECK(it.end().eof);
    CHECK_EQ(it.map.size(), 1u);
    CHECK_EQ(it.server.messages.size(), 0u);
}

TEST(deviations, after_quit_in_another_packet) {
    session it;
    it.end().send("QUIT\r\n");
    asyncore::poll(1.0, &it.map);
    it.end().send_some("NOOP\r\n");
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "221 Bye\r\n");
}

// Deviation 9
TEST(deviations, per_channel_limits) {
    session it;
    it.line("EHLO a", EHLO);
    it.channel().command_size_limits["NOOP"] = 6;
    it.line("NOOP hi", "500 Error: line too long");

    support::dialog other(it.map, wire::to(it.server));
    other.hear(BANNER);
    CHECK(it.channel().command_size_limits.empty());
    other.line("EHLO a", EHLO);
    other.line("NOOP hi", "501 Syntax: NOOP");
    CHECK_EQ(it.channel().command_size_limits.size(), 1u);
    CHECK_EQ(it.channel().command_size_limits.at("MAIL"), 538u);
    other.end();
    it.client.end();
}

// Deviation 10
TEST(deviations, options_and_utf8_status) {
    smtpd::options with;
    with.enable_SMTPUTF8 = true;
    session it(with);
    it.line("EHLO a", "250-\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250 HELP");
    it.lines({{"MAIL FROM:<a@b> SMTPUTF8 SIZE=99999999", "552 Error: message size exceeds fixed maximum message size"},
              {"MAIL FROM:<a@b> SMTPUTF8=1", "501 Error: SMTPUTF8 takes no arguments"},
              {"MAIL FROM:<a@b> SMTPUTF8 X=1", "555 MAIL FROM parameters not recognized or not implemented"}});
    CHECK(!it.channel().require_SMTPUTF8);
    CHECK(it.channel().mail_options.empty());
    it.lines({{"MAIL FROM:<a@b> BODY=8BITMIME", "250 OK"},
              {"MAIL FROM:<z@b> SMTPUTF8", "503 Error: nested MAIL command"},
              {"RCPT TO:<c@d>", "250 OK"},
              {"RCPT TO:<c@d> X=1", "555 RCPT TO parameters not recognized or not implemented"}});
    CHECK(!it.channel().require_SMTPUTF8);
    it.server.status = "250 re\u00e7u, merci";
    it.lines({{"DATA", DATA_START}, {"x\r\n.", "250 re\u00e7u, merci"}});
    CHECK_EQ(list(it.server.messages.at(0).mail_options), "['BODY=8BITMIME']");
    CHECK_EQ(list(it.server.messages.at(0).rcpt_options), "[]");
    it.lines({{"MAIL FROM:<a@b> SMTPUTF8", "250 OK"}, {"RCPT TO:<c@d>", "250 OK"}});
    CHECK(it.channel().require_SMTPUTF8);
    it.lines({{"DATA", DATA_START}, {"x\r\n.", "250 re\u00e7u, merci"}});
    CHECK(!it.channel().require_SMTPUTF8);
    it.client.end();
}

// Deviation 21
TEST(deviations, recipient_cap) {
    CHECK_EQ(smtpd::options().rcpt_limit, 1000u);
    smtpd::options with;
    with.rcpt_limit = 3;
    session it(with);
    it.lines({{"HELO a", "250 "}, {"MAIL FROM:<a@b>", "250 OK"}});
    for (const char* to : {"1", "2", "3"}) it.line(std::string("RCPT TO:<") + to + "@d>", "250 OK");
    it.line("RCPT TO:<4@d>", "452 Error: too many recipients");
    it.line("RCPT TO:<", "501 Syntax: RCPT TO: <address>");
    it.line("RCPT TO:<5@d>", "452 Error: too many recipients");
    it.lines({{"DATA", DATA_START}, {"x\r\n.", "250 OK"}});
    CHECK_EQ(told(it.server.messages.at(0)), "a@b -> ['1@d', '2@d', '3@d']: 'x'");
    it.line("MAIL FROM:<a@b>", "250 OK");
    it.line("RCPT TO:<6@d>", "250 OK");
    it.client.end();
}

// ---------------------------------------------------------------------------------------------------------
// Messages
// ---------------------------------------------------------------------------------------------------------

// Deviation 21
TEST(deviations, recipient_cap_none) {
    smtpd::options with;
    with.rcpt_limit = 0;
    session it(with);
    it.lines({{"HELO a", "250 "}, {"MAIL FROM:<a@b>", "250 OK"}});
    for (int i = 0; i < 1001; ++i) it.line("RCPT TO:<c@d>", "250 OK");
    CHECK_EQ(it.channel().rcpttos.size(), 1001u);
    it.client.end();
}

// Deviation 5
TEST(deviations, too_much_data) {
    smtpd::options with;
    with.data_size_limit = 32;
    session it(with);
    it.helo_to_data();
    it.line(std::string(30, 'x') + "\r\n.", "250 OK");
    it.mail_to_data();
    it.line(std::string(32, 'x') + "\r\n.", "250 OK");
    it.mail_to_data();
    it.client.send(std::string(20, 'x'));
    CHECK_EQ(it.channel().received_lines.size(), 20u);
    it.client.send(std::string(20, 'x'));
    CHECK_EQ(it.channel().received_lines.size(), 0u);
    CHECK(it.channel().received_lines.capacity() < 64);   // given back, not just emptied
    for (int i = 0; i < 10; ++i) it.client.send("NOOP\r\n" + std::string(60000, 'x'));
    CHECK(it.channel().received_lines.capacity() < 64);
    it.client.hear("");   // one answer, at the end of data
    it.line("\r\n.\r\nNOOP", "552 Error: Too much mail data\r\n250 OK");
    it.line("DATA", "503 Error: need RCPT command");
    it.mail_to_data();
    it.line("x\r\n.", "250 OK");
    CHECK_EQ(it.server.messages.size(), 3u);
    CHECK_EQ(told(it.server.messages.at(2)), "a@b -> ['c@d']: 'x'");
    it.client.end();
}

// Deviation 6
TEST(deviations, lone_dot) {
    session it;
    it.line("HELO a", "250 ");
    it.mail_to_data();
    it.line(".", "250 OK");
    it.mail_to_data();
    for (const char* piece : {".", "\r", "\n"}) it.client.send(piece);
    it.client.hear("250 OK\r\n");
    it.mail_to_data();
    it.line("\r\n.", "250 OK");   // an empty line, as in Python
    CHECK_EQ(it.say("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\nNOOP\r\n"),
             "250 OK\r\n250 OK\r\n" + DATA_START + "\r\n250 OK\r\n250 OK\r\n");
    CHECK_EQ(it.server.messages.size(), 4u);
    for (const auto& message : it.server.messages) CHECK_EQ(message.data, "");
    // A dot that only begins a line is not the end.
    it.mail_to_data();
    it.line("..\r\n.x\r\n.", "250 OK");
    CHECK_EQ(it.server.messages.at(4).data, ".\nx");
    it.client.end();
}

// Our way to see that dot must not harm who empties the buffers.
TEST(deviations, lone_dot_and_discarded_buffers) {
    session it;
    it.helo_to_data();
    it.channel().discard_buffers();
    it.client.send("x");
    it.line("y\r\n.", "250 OK");
    CHECK_EQ(it.server.messages.at(0).data, "xy");
    it.client.end();
}

// Deviation 8
TEST(deviations, hook_throws) {
    session it;
    it.server.hook = [](const smtpd::message_options&) -> std::optional<std::string> {
        throw std::runtime_error("disk full\r\n250 OK");
    };
    it.helo_to_data();
    {
        captured out(std::cout);
        it.line("x\r\n.", "451 Error: message not processed");
        const std::string log = out.text();
        CHECK_EQ(log.substr(0, 7), "error: ");
        const std::string last = " (std::runtime_error:disk full\\r\\n250 OK)\n";
        CHECK_EQ(log.substr(log.size() - std::min(log.size(), last.size())), last);
    }
    it.line("DATA", "503 Error: need RCPT command");
    it.server.hook = [](const smtpd::message_options&) -> std::optional<std::string> { throw 42; };
    it.mail_to_data();
    {
        captured out(std::cout);
        it.line("x\r\n.", "451 Error: message not processed");
        CHECK(out.text().find("unknown exception") != std::string::npos);
    }
    it.server.hook = nullptr;
    it.mail_to_data();
    it.line("y\r\n.", "250 OK");
    it.client.end();
}

// Deviation 11
TEST(deviations, split_utf8) {
    smtpd::options with;
    with.decode_data = true;
    session it(with);
    it.helo_to_data();
    for (const char* piece : {"h\xc3", "\xa9 \xf0", "\x9f\x92", "\xa9\r\n.\r\n"}) it.client.send(piece);
    it.client.hear("250 OK\r\n");
    CHECK_EQ(it.channel().received_data, "h\u00e9 \U0001f4a9");
    CHECK_EQ(it.server.messages.at(0).data, "h\u00e9 \U0001f4a9");
    for (const std::string bad : {"h\xff", "\xc3", "\xed\xa0\x80", "\xc0\xaf", "\xe2\x82\r\n\xac"}) {
        it.mail_to_data();
        it.line(bad + "\r\n.", "554 Error: message is not valid UTF-8");
    }
    it.line("DATA", "503 Error: need RCPT command");
    CHECK_EQ(it.server.messages.size(), 1u);
    it.client.end();
}

// ---------------------------------------------------------------------------------------------------------
// The server
// ---------------------------------------------------------------------------------------------------------

// Deviation 46
TEST(deviations, banner_version) {
    map_type map;
    support::recorder server(map);
    auto end = wire::to(server);
    CHECK_EQ(support::wait_for(map, end, "\r\n"), support::banner("mx.test"));
}

// Deviation 12
TEST(deviations, host_name) {
    map_type map;
    smtpd::options with;
    with.map = &map;
    smtpd::SMTPServer server({"127.0.0.1", 0}, {}, with);
    CHECK_EQ(server.settings.fqdn, asyncore::getfqdn());
    CHECK(!server.settings.fqdn.empty());
    // Asked for once: what the server keeps is what each client hears.
    for (const char* name : {"first.example", "first.example", "second.example"}) {
        server.settings.fqdn = name;
        auto end = wire::to(server);
        CHECK_EQ(support::wait_for(map, end, "\r\n"), support::banner(name));
    }
}

// Deviation 13
TEST(deviations, listen_backlog) {
    constexpr std::size_t burst = 64;
    map_type map;
    support::recorder server(map);
    const asyncore::address at = server.socket->getsockname();
    std::vector<asyncore::socket_type> clients;
    std::vector<pollfd> wanted;
    for (std::size_t i = 0; i < burst; ++i) {
        clients.emplace_back(AF_INET, SOCK_STREAM);
        clients.back().connect_ex(at);
        wanted.push_back({clients.back().fileno(), POLLOUT, 0});
    }
    // All of them are connected before the loop has looked once.
    std::size_t connected = 0;
    const auto end = asyncore::clock::now() + 500ms;
    while (connected < burst && asyncore::clock::now() < end) {
        ::poll(wanted.data(), burst, 10);
        connected = 0;
        for (const auto& it : wanted) connected += it.revents == POLLOUT;
    }
    CHECK_EQ(connected, burst);
    // One pass accepts them all.
    asyncore::poll(1.0, &map);
    CHECK_EQ(map.size(), 1 + burst);
}

// Deviation 41
TEST(deviations, unix_peer) {
    map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    const std::string path = "/tmp/smtpd-test-" + std::to_string(::getpid()) + ".sock";
    ::unlink(path.c_str());
    smtpd::DebuggingServer server(asyncore::address::unix_path(path), {}, with);
    asyncore::socket_type sock(AF_UNIX, SOCK_STREAM);
    CHECK_EQ(sock.connect_ex(asyncore::address::unix_path(path)), 0);
    ::unlink(path.c_str());
    wire end(std::move(sock));
    end.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nSubject: x\r\n\r\nhi\r\n.\r\nQUIT\r\n");
    captured out(std::cout);
    CHECK_EQ(support::wait_for_eof(map, end), support::banner("mx.test") + "250 mx.test\r\n250 OK\r\n250 OK\r\n" +
                                                  DATA_START + "\r\n250 OK\r\n221 Bye\r\n");
    CHECK_EQ(out.text(),
             "---------- MESSAGE FOLLOWS ----------\n"
             "Subject: x\n"
             "X-Peer: unix\n"
             "\n"
             "hi\n"
             "------------ END MESSAGE ------------\n");
}

// What DebuggingServer prints of a message.
static std::string printed(std::string_view data, bool decode_data = false) {
    map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    with.decode_data = decode_data;
    smtpd::DebuggingServer server({"127.0.0.1", 0}, {}, with);
    auto end = wire::to(server);
    end.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n");
    end.send(data);
    end.send("\r\n.\r\nQUIT\r\n");
    captured out(std::cout);
    support::wait_for_eof(map, end);
    const std::string begin = "---------- MESSAGE FOLLOWS ----------\n",
                      last = "------------ END MESSAGE ------------\n";
    std::string text = out.text();
    CHECK_EQ(text.substr(0, begin.size()), begin);
    CHECK_EQ(text.substr(text.size() - last.size()), last);
    return text.substr(begin.size(), text.size() - begin.size() - last.size());
}

// Deviation 24
TEST(deviations, debugging_server) {
    CHECK_EQ(printed("A: 1\r\n\r\nb'text' \"text\" \\ \t.\r\n\r\nend"),
             "A: 1\nX-Peer: unix\n\nb'text' \"text\" \\ \t.\n\nend\n");
    // Nothing that drives a terminal: controls, and bytes that are no UTF-8.
    CHECK_EQ(printed({"\x1b[31m\a\b\0\x7f", 9}), "\\x1b[31m\\x07\\x08\\x00\\x7f\n");
    CHECK_EQ(printed("\x9b"
                     "31m \xc2\x9b"
                     "31m \xff\xfe"),
             "\\x9b31m \\xc2\\x9b31m \\xff\\xfe\n");
    CHECK_EQ(printed("h\u00e9llo \U0001f4a9"), "h\u00e9llo \U0001f4a9\n");
    CHECK_EQ(printed("cut \xe2\x82"), "cut \\xe2\\x82\n");
    // A bare CR ends a line, as it does in Python.
    CHECK_EQ(printed("one\rtwo\nthree\r\n\r\nfour"), "one\ntwo\nthree\nX-Peer: unix\n\nfour\n");
    CHECK_EQ(printed("a\v\fb\x1c"
                     "c"),
             "a\\x0b\\x0cb\\x1cc\n");
    CHECK_EQ(printed("a\vb\fc\x1c"
                     "d\u0085e\u2028f",
                     true),
             "a\nb\nc\nd\ne\nf\n");
    CHECK_EQ(printed(""), "");
}

// Deviation 25
TEST(deviations, debugging_server_cannot_print) {
    map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    smtpd::DebuggingServer server({"127.0.0.1", 0}, {}, with);
    auto end = wire::to(server);
    end.send("HELO a\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n");
    {
        struct full : std::streambuf {
        } takes_nothing;
        struct instead {
            std::streambuf* before;
            explicit instead(std::streambuf* now) : before(std::cout.rdbuf(now)) {}
            ~instead() { std::cout.rdbuf(before); }   // its state is good again, too
        } instead(&takes_nothing);
        CHECK_THROWS(support::run_until(map, [] { return false; }), asyncore::ExitNow);
    }
    CHECK_EQ(end.take(), support::banner("mx.test") + "250 mx.test\r\n250 OK\r\n250 OK\r\n" + DATA_START +
                             "\r\n");   // the message is not acknowledged
}

// Deviations 26, 27
TEST(deviations, debugstream) {
    captured told(smtpd::DEBUGSTREAM);
    {
        session it;
        const std::string started = told.text();
        CHECK_EQ(started.substr(0, 22), "SMTPServer started at ");
        CHECK(started.find(
                  "\n\tLocal addr: ('127.0.0.1', 0)\n\tRemote addr:None\nIncoming connection from ''\nPeer: ''\n") !=
              std::string::npos);
        it.line("EHLO a", EHLO);
        it.line("MAIL FROM:<a\x1b@b> BODY=7BIT", MAIL_SYNTAX);
        it.line("MAIL FROM:<\u00e9@b>", "250 OK");
        it.line("RCPT TO:<'@d>", "250 OK");
        it.line("RCPT", RCPT_SYNTAX);
        it.line("\xff\x1b[31m", "500 Error: bad syntax");
        CHECK_EQ(told.text().substr(started.size()),
                 "Data: b'EHLO a'\n"
                 "Data: b'MAIL FROM:<a\\x1b@b> BODY=7BIT'\n"
                 "===> MAIL 'FROM:<a\\x1b@b> BODY=7BIT'\n"
                 "Data: b'MAIL FROM:<\\xc3\\xa9@b>'\n"
                 "===> MAIL 'FROM:<\\xc3\\xa9@b>'\n"
                 "sender: '\\xc3\\xa9@b'\n"
                 "Data: b\"RCPT TO:<'@d>\"\n"
                 "===> RCPT \"TO:<'@d>\"\n"
                 "recips: [\"'@d\"]\n"
                 "Data: b'RCPT'\n"
                 "===> RCPT None\n"
                 "Data: b'\\xff\\x1b[31m'\n");
        it.client.end();
    }
}

// Deviation 26
TEST(deviations, debugstream_of_text) {
    captured told(smtpd::DEBUGSTREAM);
    smtpd::options with;
    with.decode_data = true;
    session it(with);
    const std::string started = told.text();
    it.line("HELO \u00e9", "250 ");
    it.line("MAIL", "501 Syntax: MAIL FROM: <address>");
    CHECK_EQ(told.text().substr(started.size()),
             "Data: 'HELO \\xc3\\xa9'\n"
             "Data: 'MAIL'\n"
             "===> MAIL None\n");
}

// A channel that cannot be made, or fails at once, is its client's loss alone.
// Deviation 23
TEST(deviations, new_channel_fails) {
    struct failing : support::recorder {
        int way = 0;
        struct channel : smtpd::SMTPChannel {
            int way;
            channel(failing& s, std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from)
                : SMTPChannel(s, std::move(sock), from, s.settings), way(s.way) {
                if (way == 1) throw std::runtime_error("constructor");
            }
            void start() override {
                SMTPChannel::start();
                if (way == 2) throw std::runtime_error("start");
            }
        };
        using recorder::recorder;
        std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                          const asyncore::address& from) override {
            if (way == 0) throw std::runtime_error("channel_class");
            if (way == 3) return nullptr;   // not wanted
            if (way == 4) throw asyncore::ExitNow();
            return std::make_unique<channel>(*this, std::move(sock), from);
        }
    };
    const std::string banner = support::banner("mx.test");
    map_type map;
    failing server(map);
    for (const char* what : {"channel_class", "constructor", "start", ""}) {
        captured out(std::cout);
        auto end = wire::tcp("127.0.0.1", server.port());
        CHECK_EQ(support::wait_for_eof(map, end), server.way == 2 ? banner : "");
        const std::string text = out.text(), begin = "error: uncaptured C++ exception in a new channel of <";
        CHECK_EQ(text.substr(0, begin.size()), *what ? begin : "");
        if (*what) CHECK_EQ(text.substr(text.find(" (")), " (std::runtime_error:" + std::string(what) + ")\n");
        CHECK(server.accepting);
        CHECK_EQ(map.size(), 1u);
        ++server.way;
    }
    auto last = wire::tcp("127.0.0.1", server.port());
    CHECK_THROWS(support::run_until(map, [] { return false; }), asyncore::ExitNow);
    ++server.way;
    server.handle_accepted(std::make_unique<asyncore::socket_type>(AF_INET, SOCK_STREAM), {});   // gone already
    CHECK_EQ(map.size(), 1u);
    auto end = wire::tcp("127.0.0.1", server.port());
    CHECK_EQ(support::wait_for(map, end, "\r\n"), banner);
}

// An error while an error is handled: the connection is lost, the loop is not.
// Deviation 23
TEST(deviations, error_in_handle_error) {
    struct failing : asyncore::dispatcher {
        using dispatcher::dispatcher;
        void handle_read() override { throw std::runtime_error("first"); }
        void log_info(std::string_view, std::string_view) override { throw std::runtime_error("second"); }
        void handle_close() override {
            close();
            throw std::runtime_error("third");
        }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        auto [end, sock] = wire::pair();
        failing it(std::move(sock), &map);
        end.send("x");
        pass(map, use_poll, 5.0);
        CHECK(map.empty());
        CHECK_EQ(support::wait_for_eof(map, end), "");
    }
}

// ---------------------------------------------------------------------------------------------------------
// Descriptors
// ---------------------------------------------------------------------------------------------------------

namespace {

// The soft limit of descriptors, while this one lives.
class descriptor_limit {
  public:
    explicit descriptor_limit(rlim_t wanted) {
        ::getrlimit(RLIMIT_NOFILE, &before_);
        rlimit now = before_;
        now.rlim_cur = wanted;
        set_ = ::setrlimit(RLIMIT_NOFILE, &now) == 0;
    }
    ~descriptor_limit() { ::setrlimit(RLIMIT_NOFILE, &before_); }
    descriptor_limit(const descriptor_limit&) = delete;
    descriptor_limit& operator=(const descriptor_limit&) = delete;
    bool set() const { return set_; }

  private:
    rlimit before_{};
    bool set_;
};

// No descriptor beyond those that are open now.
rlim_t lowest_free() {
    const int fd = ::dup(0);
    if (fd < 0) throw std::runtime_error("dup");
    ::close(fd);
    return static_cast<rlim_t>(fd);
}

}   // namespace

static void emfile_in_accept(bool use_poll) {
    map_type map;
    support::recorder server(map);
    const int port = server.port();
    auto first = wire::tcp("127.0.0.1", port);
    support::wait_for(map, first, "\r\n", use_poll);
    auto second = wire::tcp("127.0.0.1", port);
    captured out(std::cout);
    try {   // a sanitizer wants a descriptor when it meets a class for the first time
        throw std::system_error(EMFILE, std::generic_category(), "accept");
    } catch (const std::system_error& error) {
        CHECK_EQ(error.code().value() + (error.what() ? 0 : 1), EMFILE);
    }
    {
        descriptor_limit none_left(lowest_free());
        CHECK(none_left.set());
        CHECK_EQ(support::wait_for_eof(map, second, use_poll), "421 Error: too many connections\r\n");
        first.send("NOOP\r\n");
        CHECK_EQ(support::wait_for(map, first, "\r\n", use_poll), "250 OK\r\n");
        CHECK(server.accepting);
        CHECK(!server.readable());   // it rests: no event, no work
    }
    CHECK_EQ(out.text().substr(0, 32), "error: cannot accept a client of");
    auto fourth = wire::tcp("127.0.0.1", port);
    CHECK_EQ(support::wait_for(map, fourth, "\r\n", use_poll), support::banner("mx.test"));
}

// Deviation 14
TEST(deviations, emfile) { emfile_in_accept(false); }
TEST(deviations, emfile_with_poll) { emfile_in_accept(true); }

// Deviation 15
TEST(deviations, fd_setsize) {
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const rlim_t wanted = FD_SETSIZE + 16;
    if (limit.rlim_max != RLIM_INFINITY && limit.rlim_max < wanted) SKIP("descriptors end below FD_SETSIZE");
    descriptor_limit enough(limit.rlim_cur == RLIM_INFINITY ? limit.rlim_cur : std::max(limit.rlim_cur, wanted));
    CHECK(enough.set());
    map_type map;
    support::recorder server(map);
    auto low = wire::to(server);
    auto [high, sock] = wire::pair();
    const int fd = ::fcntl(sock->fileno(), F_DUPFD_CLOEXEC, FD_SETSIZE);
    CHECK(fd >= FD_SETSIZE);
    sock.reset();
    server.handle_accepted(std::make_unique<asyncore::socket_type>(fd), asyncore::address::unix_path(""));
    // loop() as anybody calls it; select() can't do that, so poll() does.
    for (wire* end : {&low, &high}) {
        end->send("NOOP\r\n");
        asyncore::loop(5.0, false, &map, 1);
        CHECK_EQ(end->take(), support::banner("mx.test") + "250 OK\r\n");
    }
    high.send("QUIT\r\n");
    CHECK_EQ(support::wait_for_eof(map, high), "221 Bye\r\n");
}

// ---------------------------------------------------------------------------------------------------------
// The loop
// ---------------------------------------------------------------------------------------------------------

namespace {

// Its channels count their exceptional conditions.
struct counting_server : support::recorder {
    int urgent = 0;

    struct channel : smtpd::SMTPChannel {
        counting_server& server;
        channel(counting_server& s, std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from)
            : SMTPChannel(s, std::move(sock), from, s.settings), server(s) {}
        void handle_expt() override {
            ++server.urgent;
            SMTPChannel::handle_expt();
        }
    };

    using recorder::recorder;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        return std::make_unique<channel>(*this, std::move(sock), from);
    }
};

}   // namespace

static void urgent_byte(bool use_poll) {
    map_type map;
    counting_server server(map);
    auto end = wire::tcp("127.0.0.1", server.port());
    support::wait_for(map, end, "\r\n", use_poll);
    end.send("NO");
    end.socket().send("!", MSG_OOB);
    support::run_until(
        map, [&] { return server.urgent > 0; }, use_poll);
    // It is announced once. A loop that spins has an event in each of these passes.
    for (int i = 0; i < 10; ++i) pass(map, use_poll);
    CHECK_EQ(server.urgent, 1);
    const auto before = asyncore::clock::now();
    pass(map, use_poll, 0.01);
    CHECK(asyncore::clock::now() - before >= 9ms);
    // It is no part of what the client says.
    end.send("OP\r\n");
    CHECK_EQ(support::wait_for(map, end, "\r\n", use_poll), "250 OK\r\n");
}

// Deviation 16
TEST(deviations, urgent_byte) { urgent_byte(false); }
TEST(deviations, urgent_byte_with_poll) { urgent_byte(true); }

namespace {

struct collector : asynchat::async_chat {
    std::string data;
    using async_chat::async_chat;
    void collect_incoming_data(std::string_view bytes) override { data += bytes; }
    void found_terminator() override {}
};

}   // namespace

static void hup_with_data_pending(bool use_poll) {
    map_type map;
    auto [end, sock] = wire::pair();
    collector chat(std::move(sock), &map);
    chat.ac_in_buffer_size = 100;   // many reads
    end.send(std::string(10000, 'x'));
    end.close();
    support::run_until(
        map, [&] { return map.empty(); }, use_poll);
    CHECK_EQ(chat.data.size(), 10000u);
}

// Deviation 17
TEST(deviations, hup_with_data) { hup_with_data_pending(true); }
TEST(deviations, hup_with_data_and_select) { hup_with_data_pending(false); }

TEST(deviations, hup_with_data_in_a_pipe) {
    struct reader : asyncore::file_dispatcher {
        std::string data;
        using file_dispatcher::file_dispatcher;
        bool writable() override { return false; }
        void handle_read() override { data += recv(100); }
        void handle_close() override { close(); }
    };
    for (const bool use_poll : {false, true}) {
        map_type map;
        int fds[2];
        CHECK_EQ(::pipe(fds), 0);
        reader it(fds[0], &map);
        ::close(fds[0]);
        const std::string text(10000, 'x');
        CHECK_EQ(::write(fds[1], text.data(), text.size()), 10000);
        ::close(fds[1]);
        support::run_until(
            map, [&] { return map.empty(); }, use_poll);
        CHECK_EQ(it.data.size(), 10000u);
    }
}

// ---------------------------------------------------------------------------------------------------------
// Clients that do not read, or have nothing more to say
// ---------------------------------------------------------------------------------------------------------

namespace {

// Commands with a number each, and the reply to one.
std::string numbered(int from, int to) {
    std::string text;
    for (int i = from; i < to; ++i) text += "X" + std::to_string(i) + "\r\n";
    return text;
}
std::string replies(int from, int to) {
    std::string text;
    for (int i = from; i < to; ++i) text += "500 Error: command \"X" + std::to_string(i) + "\" not recognized\r\n";
    return text;
}

}   // namespace

static void client_that_never_reads(bool use_poll) {
    constexpr int commands = 20000;
    smtpd::options with;
    with.reply_queue_limit = 10000;
    session it(with);
    auto& channel = it.channel();
    channel.socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
    const std::string all = numbered(0, commands);
    // It writes whatever is taken from it, and never reads.
    std::string_view rest = all;
    std::size_t most = 0, read_at_most = 0;
    for (int idle = 0; idle < 10;) {
        const std::size_t sent = it.end().send_some(rest.substr(0, 50000));
        rest.remove_prefix(sent);
        pass(it.map, use_poll);
        most = std::max(most, channel.queued());
        read_at_most = std::max(read_at_most, channel.ac_in_buffer().size());
        idle = sent == 0 || rest.empty() ? idle + 1 : 0;
    }
    CHECK(most > 10000);
    CHECK(most <= 10000 + 100);   // the limit, and the one reply that went over it
    CHECK(read_at_most <= channel.ac_in_buffer_size + 4);
    CHECK(!channel.readable());
    // Now it reads, a little at a time: reading resumes, nothing is lost, nothing out of order.
    std::string heard;
    const std::string expected = replies(0, commands);
    const auto end = asyncore::clock::now() + 5s;
    while (heard.size() < expected.size() && asyncore::clock::now() < end) {
        rest.remove_prefix(it.end().send_some(rest.substr(0, 50000)));
        it.end().receive(3000);
        heard += std::exchange(it.end().received, {});
        pass(it.map, use_poll);
        most = std::max(most, channel.queued());
        read_at_most = std::max(read_at_most, channel.ac_in_buffer().size());
    }
    CHECK(heard == expected);
    CHECK(most <= 10000 + 100);
    CHECK(read_at_most <= channel.ac_in_buffer_size + 4);
    it.line("NOOP", "250 OK");
    it.client.end();
}

// Deviation 18
TEST(deviations, reply_queue) { client_that_never_reads(false); }
TEST(deviations, reply_queue_with_poll) { client_that_never_reads(true); }

TEST(deviations, reply_queue_and_idle_timeout) {
    // It never reads at all: no 421 that nobody fetches, but the end.
    CHECK_EQ(smtpd::options().reply_queue_limit, std::size_t(1) << 20);
    smtpd::options with;
    with.reply_queue_limit = 1000;
    with.idle_timeout = 30ms;
    session it(with);
    it.channel().socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
    it.end().send(numbered(0, 5000));
    for (int i = 0; i < 5; ++i) asyncore::poll(0.0, &it.map);
    const auto due = it.channel().deadline();
    support::run_until(it.map, [&] { return asyncore::clock::now() > due; });
    asyncore::poll(0.0, &it.map);
    CHECK_EQ(it.map.size(), 1u);
    const std::string heard = it.end().take();
    CHECK(it.end().eof);
    CHECK_EQ(heard, replies(0, 5000).substr(0, heard.size()));
}

// The client says all it has to say, closes its side, and then reads.
static void half_close(bool use_poll, int commands, std::size_t reply_queue_limit) {
    for (const std::string quit : {"", "QUIT\r\n"}) {
        smtpd::options with;
        with.reply_queue_limit = reply_queue_limit;
        session it(with);
        it.channel().socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
        it.end().send(numbered(0, commands) + quit);
        it.end().shutdown_write();
        for (int i = 0; i < 5; ++i) pass(it.map, use_poll);   // before it reads anything
        const std::string expected = replies(0, commands) + (quit.empty() ? "" : "221 Bye\r\n");
        const std::string heard = support::wait_for_eof(it.map, it.end(), use_poll);
        CHECK_EQ(heard.size(), expected.size());
        CHECK(heard == expected);
    }
}

// Deviation 19
TEST(deviations, half_close) { half_close(false, 5, 2000); }
TEST(deviations, half_close_with_poll) { half_close(true, 5, 2000); }
TEST(deviations, half_close_and_replies_that_wait) { half_close(false, 500, 1 << 20); }
TEST(deviations, half_close_and_replies_that_wait_with_poll) { half_close(true, 500, 1 << 20); }
TEST(deviations, half_close_and_commands_that_wait) { half_close(false, 5000, 2000); }
TEST(deviations, half_close_and_commands_that_wait_with_poll) { half_close(true, 5000, 2000); }

// ---------------------------------------------------------------------------------------------------------
// The idle timeout
// ---------------------------------------------------------------------------------------------------------

static smtpd::options idle(std::chrono::milliseconds timeout) {
    smtpd::options with;
    with.idle_timeout = timeout;
    return with;
}

static void idle_timeout(bool use_poll) {
    CHECK(smtpd::options().idle_timeout == 300s);
    session it(idle(20ms));
    it.line("NOOP", "250 OK");
    const auto before = asyncore::clock::now();
    CHECK_EQ(support::wait_for_eof(it.map, it.end(), use_poll), "421 Error: timeout exceeded\r\n");
    CHECK(asyncore::clock::now() - before >= 15ms);
    CHECK_EQ(it.map.size(), 1u);
}

// Deviation 20
TEST(deviations, idle_timeout) { idle_timeout(false); }
TEST(deviations, idle_timeout_with_poll) { idle_timeout(true); }

TEST(deviations, idle_timeout_in_data) {
    session it(idle(20ms));
    it.helo_to_data();
    it.client.send("half a message");
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "421 Error: timeout exceeded\r\n");
    CHECK_EQ(it.server.messages.size(), 0u);
}

TEST(deviations, idle_timeout_none) {
    session it(idle(0ms));
    it.helo_to_data();
    it.client.send("x");
    CHECK(it.channel().deadline() > asyncore::clock::now() + 30min);   // data_timeout
    it.channel().data_timeout = 0ms;
    CHECK(it.channel().deadline() == asyncore::never);
}

TEST(deviations, idle_timeout_for_ever) {
    // The longest there is, which somebody may take for "never".
    session it(idle(std::chrono::milliseconds::max()));
    it.line("NOOP", "250 OK");
    CHECK(it.channel().deadline() > asyncore::clock::now() + 1h);
    it.client.end();
}

TEST(deviations, idle_timeout_of_a_slow_command) {
    session it(idle(300s));
    auto& channel = it.channel();
    // A command counts from its first byte, however many come.
    it.client.send("N");
    const auto due = channel.deadline();
    CHECK(due <= asyncore::clock::now() + 300s);
    for (const char* byte : {"O", "O", "P"}) {
        it.client.send(byte);
        CHECK(channel.deadline() == due);
    }
    it.client.send(std::string(600, 'x'));   // too long already
    CHECK(channel.deadline() == due);
    // The next one begins anew.
    it.line("", "500 Error: line too long");
    CHECK(channel.deadline() > due);
    it.client.end();
}

TEST(deviations, idle_timeout_of_a_slow_command_comes) {
    session it(idle(40ms));
    const auto end = asyncore::clock::now() + 5s;
    while (!it.end().eof && asyncore::clock::now() < end) {   // a byte now and then
        it.end().send_some("x");
        asyncore::poll(0.005, &it.map);
        it.end().receive_all();
    }
    CHECK_EQ(it.end().take(), "421 Error: timeout exceeded\r\n");
}

TEST(deviations, idle_timeout_of_slow_data) {
    session it(idle(300s));
    auto& channel = it.channel();
    it.helo_to_data();
    // A message counts from its last progress.
    auto due = channel.deadline();
    for (const char* piece : {"x", "y", "\r\nz"}) {
        it.client.send(piece);
        CHECK(channel.deadline() > due);
        due = channel.deadline();
    }
    it.line("\r\n.", "250 OK");
    CHECK(channel.deadline() > due);
    it.client.end();
}

TEST(deviations, idle_timeout_of_a_client_that_fetches_slowly) {
    // Replies that are fetched are progress.
    session it(idle(300s));
    auto& channel = it.channel();
    channel.socket->setsockopt(SOL_SOCKET, SO_SNDBUF, 4096);
    it.end().send(numbered(0, 2000));
    for (int i = 0; i < 5; ++i) asyncore::poll(0.0, &it.map);
    CHECK(channel.queued() > 10000);
    const auto due = channel.deadline();
    support::run_until(it.map, [&] {
        it.end().receive();
        return channel.deadline() > due;
    });
    CHECK(channel.queued() > 0);
    CHECK_EQ(it.hear(), replies(0, 2000));
    it.client.end();
}

// While it is paused, its clock stands still.
TEST(deviations, idle_timeout_of_a_paused_channel) {
    session it(idle(20ms));
    auto& channel = it.channel();
    it.line("NOOP", "250 OK");
    channel.pause();
    CHECK(channel.deadline() > asyncore::clock::now() + 500ms);
    const auto end = asyncore::clock::now() + 30ms;
    while (asyncore::clock::now() < end) asyncore::poll(0.03, &it.map);
    channel.resume();
    CHECK(channel.deadline() > asyncore::clock::now());
    it.line("NOOP", "250 OK");
    CHECK_EQ(support::wait_for_eof(it.map, it.end()), "421 Error: timeout exceeded\r\n");
}

namespace {

// Somebody else in the same loop, who takes his time.
struct dawdler : asyncore::file_dispatcher {
    std::function<void()> on_read;
    dawdler(int fd, asyncore::map_type& map) : file_dispatcher(fd, &map) {}
    bool writable() override { return false; }
    void handle_read() override {
        recv(1);
        on_read();
    }
};

}   // namespace

// What a client says while another's message is being handled has not been said too late.
TEST(deviations, idle_timeout_is_not_the_servers_own_time) {
    for (const bool use_poll : {false, true}) {
        session it(idle(150ms));
        int ends[2];
        CHECK_EQ(::pipe(ends), 0);
        dawdler other(ends[0], it.map);
        ::close(ends[0]);
        other.on_read = [&] {
            it.end().send("NOOP\r\n");
            std::this_thread::sleep_for(200ms);
        };
        it.line("NOOP", "250 OK");
        CHECK_EQ(::write(ends[1], "x", 1), 1);
        for (int i = 0; i < 3; ++i) use_poll ? asyncore::poll2(0.0, &it.map) : asyncore::poll(0.0, &it.map);
        it.end().receive_all();
        CHECK_EQ(it.end().take(), "250 OK\r\n");
        ::close(ends[1]);
    }
}

// Deviation 59
TEST(deviations, bind_and_listen_are_the_bases) {
    struct own : support::recorder {
        using recorder::recorder;
        int calls = 0;
        void bind(const asyncore::address& to) override { ++calls, recorder::bind(to); }
        void listen(int backlog) override { ++calls, recorder::listen(backlog); }
    };
    asyncore::map_type map;
    own server(map);
    CHECK(server.accepting);
    CHECK_EQ(server.calls, 0);
}

// Deviation 60
TEST(deviations, ports_are_checked) {
    CHECK_THROWS(asyncore::address("127.0.0.1", 65536), std::out_of_range);
    CHECK_THROWS(asyncore::address("127.0.0.1", -1), std::out_of_range);
    CHECK_EQ(asyncore::address("127.0.0.1", 65535).port, 65535);
}
