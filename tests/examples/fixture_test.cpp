// How a test uses mail_fixture (fixture.hpp): the code under test sends mail, the test looks at what came. The first
// tests are examples; those behind the line hold the fixture to its word, feature by feature (README.md beside this).
#undef NDEBUG
#include "fixture.hpp"

#include <poll.h>
#include <unistd.h>

#include <cassert>
#include <cstdio>
#include <iostream>

using namespace std::chrono_literals;

// The code under test.
void send_welcome_mail(int port, const std::string& to) {
    smtpd::sendmail({"127.0.0.1", port}, "shop@example.com", {to}, "Subject: Welcome\n\nHello!\n",
                    smtpd::timeouts::all(5s));
}

void test_welcome_mail() {
    mail_fixture mail;
    send_welcome_mail(mail.port(), "you@example.com");
    assert(mail.wait_for(1, 5s));
    const auto message = mail.messages()[0];
    assert(message.mailfrom == "shop@example.com");
    assert(message.rcpttos == std::vector<std::string>{"you@example.com"});
    assert(message.data == "Subject: Welcome\n\nHello!");
}

void test_a_shop_that_tries_again() {
    mail_fixture mail;
    mail.fault("RCPT").address("*@example.com").reply("451 4.3.0 later").times(2);
    int tries = 0;
    while (mail.messages().empty()) {
        try {
            ++tries;
            send_welcome_mail(mail.port(), "you@example.com");
        } catch (const smtpd::SMTPResponseException& error) {
            assert(error.answer.code == 451 && error.stage == "RCPT");
        }
    }
    assert(tries == 3 && mail.messages().size() == 1);
    if (!mail.client_errors().empty()) std::cerr << mail.transcript();
    assert(mail.client_errors().empty());
}

// ---------------------------------------------------------------------------------------------------------

using strings = std::vector<std::string>;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

// A client that says what a test wants it to.
class client {
  public:
    explicit client(int port) : sock_(::socket(AF_INET, SOCK_STREAM, 0)) {
        const timeval patience{10, 0};
        ::setsockopt(sock_.fileno(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        assert(sock_.connect_ex({"127.0.0.1", port}) == 0);
    }
    void send(std::string_view bytes) {
        while (!bytes.empty()) bytes.remove_prefix(sock_.send(bytes));
    }
    // Up to the end of a reply: its line breaks are \n, and it has none at its end. "": the server has hung up.
    std::string hear() {
        std::string text;
        for (;;) {
            const std::size_t start = text.empty() ? 0 : text.rfind('\n', text.size() - 2) + 1;
            if (!text.empty() && text.back() == '\n' && (text.size() < start + 4 || text[start + 3] != '-')) break;
            char byte;
            if (receive(byte) == 0) break;
            if (byte != '\r') text += byte;
        }
        return text.substr(0, text.find_last_not_of('\n') + 1);
    }
    std::string say(const std::string& line) {
        send(line + "\r\n");
        return hear();
    }
    // All that comes until the end.
    std::string rest() {
        std::string text;
        for (char byte; receive(byte) > 0;) text += byte;
        return text;
    }
    // Whether these bytes come, and then nothing for a moment.
    bool only(const std::string& bytes) {
        for (const char expected : bytes)
            if (char byte; receive(byte) == 0 || byte != expected) return false;
        pollfd more{sock_.fileno(), POLLIN, 0};
        return ::poll(&more, 1, 30) == 0;
    }
    int fileno() const { return sock_.fileno(); }
    void reset() {
        const linger now{1, 0};
        ::setsockopt(sock_.fileno(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
        sock_.close();
    }

  private:
    std::size_t receive(char& byte) {
        try {
            return sock_.recv(&byte, 1);
        } catch (const std::system_error& error) {
            assert(error.code().value() == ECONNRESET);
            return 0;
        }
    }
    asyncore::socket_type sock_;
};

// A client that has come as far as it takes to say this.
client client_at(const mail_fixture& mail, const strings& lines) {
    client it(mail.port());
    assert(it.hear().substr(0, 3) == "220");
    for (const std::string& line : lines) it.say(line);
    return it;
}
const strings to_data{"EHLO me", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA"},
    to_rcpt{to_data.begin(), to_data.begin() + 2};

int code(mail_fixture& mail, const strings& to = {"c@d"}) {
    try {
        smtpd::sendmail({"127.0.0.1", mail.port()}, "a@b", to, "hello\n", smtpd::timeouts::all(5s));
        return 250;
    } catch (const smtpd::SMTPResponseException& error) {
        return error.answer.code;
    }
}

void test_wait_has_an_end() {
    mail_fixture mail;
    assert(!mail.wait_for(1, 10ms));
    std::thread sender([&] { send_welcome_mail(mail.port(), "you@example.com"); });
    assert(mail.wait_for(1, 5s));
    assert(!mail.wait_for(2, 10ms));
    sender.join();
}

void test_many_senders_and_two_servers() {
    mail_fixture one, other;
    std::vector<std::thread> senders;
    for (int i = 0; i < 8; ++i)
        senders.emplace_back([&, i] {
            for (int n = 0; n < 5; ++n) send_welcome_mail((i % 2 ? one : other).port(), "you@example.com");
        });
    assert(one.wait_for(20, 10s) && other.wait_for(20, 10s));
    for (auto& sender : senders) sender.join();
    assert(one.messages().size() == 20 && other.messages().size() == 20);
}

void test_stop_never_hangs() {
    for (int i = 0; i < 30; ++i) {
        mail_fixture mail;
        mail.fault("NOOP").delay(60s);
        client idle = client_at(mail, {"HELO x"}), busy = client_at(mail, to_data), late = client_at(mail, {});
        busy.send("half a mess"), late.send("NOOP\r\n");
        std::thread sender([&] {
            try {
                while (true) send_welcome_mail(mail.port(), "you@example.com");
            } catch (const smtpd::SMTPResponseException&) {
                // the server has gone
            }
        });
        if (i % 2) assert(mail.wait_for(1, 5s));
        std::thread stopper([&] { mail.stop(); });
        mail.stop();
        stopper.join(), sender.join();
        assert(mail.messages().size() >= static_cast<std::size_t>(i % 2));
        assert(mail.connections()[0].ended == "stopped");
        mail.drop_connections(), mail.stop();   // harmless
    }
}

void test_what_is_known_of_a_message() {
    mail_fixture::options with;
    with.server.enable_SMTPUTF8 = true;
    with.offer = {"DSN"};
    with.auth = {"PLAIN"};
    mail_fixture mail(with);
    client it =
        client_at(mail, {"EHLO laptop", "AUTH PLAIN AHVzZXIAc2VjcmV0", "MAIL FROM:<j\u00fcrgen@b> RET=HDRS SMTPUTF8"});
    assert(it.say("RCPT TO:<c@d> NOTIFY=NEVER") == "250 OK");
    it.say("DATA");
    assert(it.say("x\r\n.") == "250 OK");
    assert(it.say("QUIT") == "221 Bye");
    const auto message = mail.messages().at(0);
    assert(message.mailfrom == "j\u00fcrgen@b" && message.helo == "laptop" && message.user == "user" && !message.tls);
    assert((message.mail_options == strings{"SMTPUTF8", "RET=HDRS"}) &&
           message.rcpt_options == strings{"NOTIFY=NEVER"});
    assert(message.connection == 1 && mail.client_errors().empty());
}

void test_clear() {
    mail_fixture mail;
    client open = client_at(mail, {"HELO x", "FOO"});
    mail.fault("RCPT").reply("451");
    assert(code(mail) == 451 && mail.wait_ended(1, 5s));
    mail.clear_faults();
    assert(code(mail) == 250 && mail.wait_ended(2, 5s));
    assert(mail.connections().size() == 3 && mail.client_errors().size() == 1);
    mail.clear();
    assert(mail.messages().empty() && mail.client_errors().empty() && !mail.wait_for(1, 1ms));
    assert(mail.connections().size() == 1 && mail.transcript() == "# connection 1\n");
    assert(open.say("NOOP") == "250 OK");
    assert(mail.transcript() == "# connection 1\nC: NOOP\nS: 250 OK\n");
}

void test_transcript() {
    std::mutex lock;
    strings logged;
    mail_fixture::options with;
    with.server.fqdn = "host";
    with.transcript_limit = 600;
    with.log = [&](int, const std::string& line) {
        const std::lock_guard<std::mutex> guard(lock);
        logged.push_back(line);
    };
    mail_fixture mail(with);
    client it = client_at(mail, to_data);
    it.say("Subject: \u00fc\r\n\r\n..x\r\n.");
    assert(has(mail.transcript(), "# connection 1\nS: 220 host "));
    assert(
        has(mail.transcript(), "C: EHLO me\nS: 250-host\nS: 250-SIZE 33554432\nS: 250-8BITMIME\nS: 250 HELP\nC: MAIL"));
    assert(has(mail.transcript(),
               "S: 354 End data with <CR><LF>.<CR><LF>\nC: Subject: \\xc3\\xbc\nC: \nC: ..x\nC: .\nS: 250 OK\n"));
    for (int i = 0; i < 50; ++i) it.say("NOOP");
    assert(mail.transcript().size() < 700 && has(mail.transcript(), "... (and more)\n"));
    const std::lock_guard<std::mutex> guard(lock);
    assert(logged.size() > 100 && logged[1] == "C: EHLO me");
}

void test_how_connections_end() {
    mail_fixture::options with;
    with.server.idle_timeout = 20ms;
    mail_fixture mail(with);
    client idle(mail.port());
    assert(has(idle.rest(), "421 "));
    assert(mail.wait_ended(1, 5s) && mail.connections()[0].ended == "timeout");

    mail_fixture other;
    client_at(other, {"HELO x"}).say("QUIT");
    client_at(other, to_data).reset();
    client_at(other, {});
    other.fault("NOOP").drop();
    assert(client_at(other, {"HELO x"}).say("NOOP") == "");
    assert(other.wait_ended(4, 5s));
    client open = client_at(other, {"HELO x"});
    other.drop_connections();
    assert(open.rest() == "" && other.wait_ended(5, 5s));
    other.stop();
    strings ends;
    for (const auto& it : other.connections()) ends.push_back(it.ended);
    assert((ends == strings{"quit", "left", "left", "dropped", "stopped"}));
    assert(other.client_errors() == strings{"left without QUIT"});   // the third one had said nothing
}

void test_a_fault_at_every_step() {
    for (const strings& to :
         {strings{"greeting"}, {"EHLO"}, {"MAIL"}, {"RCPT"}, {"DATA"}, {"."}, {"QUIT"}, {"NOOP"}, {"*"}}) {
        const std::string& step = to[0];
        mail_fixture mail;
        mail.fault(step).reply("471 told so\nyes").times(1);
        client it(mail.port());
        strings heard{it.hear()};
        for (const char* line : {"EHLO me", "NOOP", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n.", "QUIT"}) {
            if (heard.back() == "471-told so\n471 yes" && step == "DATA") break;
            heard.push_back(it.say(line));
        }
        assert(std::count(heard.begin(), heard.end(), "471-told so\n471 yes") == 1);
        assert(step != "*" || heard[0][0] == '4');
        const bool taken = step == "greeting" || step == "NOOP" || step == "QUIT" || step == "*";
        assert(mail.messages().size() == (taken ? 1u : 0u));
    }
    mail_fixture mail;
    mail.fault("EHLO").reply("502 no");
    assert(code(mail) == 250 && has(mail.transcript(), "S: 502 no\nC: HELO "));   // the client asks again, with HELO
    mail.fault("XFOO").reply("299 a verb that there is not");
    mail.fault("HELO").reply("250 another reply, for what is done");
    client it = client_at(mail, {});
    assert(it.say("HELO x") == "250 another reply, for what is done" && it.say("MAIL FROM:<a@b>") == "250 OK");
    assert(it.say("XFOO") == "299 a verb that there is not");
}

void test_which_address_and_how_often() {
    mail_fixture mail;
    mail.fault("RCPT").address("bob@*").reply("550 no bob");
    mail.fault("RCPT").address("*@c").reply("451").times(2);
    mail.fault("RCPT").address("*@c").reply("452").from(2).times(1);
    mail.fault("VRFY").address("x*").reply("553");
    client it = client_at(mail, to_rcpt);
    strings heard;
    for (const char* to : {"al@d", "Bob@c", "al@c", "al@c", "al@c", "al@c", "al@c", "BOB@x"})
        heard.push_back(it.say(std::string("RCPT TO:<") + to + ">").substr(0, 3));
    assert((heard == strings{"250", "550", "451", "451", "250", "452", "250", "550"}));
    assert(it.say("VRFY y@z").substr(0, 3) == "252" && it.say("VRFY x@z").substr(0, 3) == "553");

    mail_fixture other;
    other.fault(".").address("bob@*").reply("552 not for bob");
    other.fault("MAIL").from(3).reply("421 enough");
    assert(code(other) == 250 && code(other, {"al@x", "bob@x"}) == 552 && code(other) == 421);
    assert(other.messages().size() == 1);
}

void test_chance() {
    const auto draw = [](unsigned seed) {
        mail_fixture::options with;
        with.seed = seed;
        mail_fixture mail(with);
        mail.fault("NOOP").chance(0.25).reply("450");
        client it = client_at(mail, {});
        std::string drawn;
        for (int i = 0; i < 400; ++i) drawn += it.say("NOOP")[0];
        return drawn;
    };
    const std::string first = draw(1), again = draw(1), other = draw(2);
    assert(first == again && first != other);
    const auto hits = std::count(first.begin(), first.end(), '4');
    assert(hits > 60 && hits < 140);
}

void test_delay_and_silence() {
    mail_fixture mail;
    mail.fault("greeting").delay(50ms);
    mail.fault("MAIL").delay(50ms).reply("250 at last");
    mail.fault(".").silence();
    const auto start = asyncore::clock::now();
    client it = client_at(mail, {"EHLO me"});
    assert(asyncore::clock::now() - start >= 50ms);
    client other = client_at(mail, {});
    it.send("MAIL FROM:<a@b>\r\n");
    assert(other.say("NOOP") == "250 OK");   // it does not wait for the first one
    assert(it.hear() == "250 at last" && asyncore::clock::now() - start >= 100ms);
    it.say("RCPT TO:<c@d>"), it.say("DATA");
    it.send("x\r\n.\r\nNOOP\r\n");
    assert(it.only("") && mail.messages().empty());
    it.reset();
    assert(mail.wait_ended(1, 5s) && mail.connections()[0].ended == "left");

    // A client that has waited long enough may go without QUIT.
    mail_fixture slow;
    slow.fault("MAIL").delay(100ms);
    slow.fault("NOOP").byte_by_byte(20ms);
    for (const char* last : {"MAIL FROM:<a@b>", "NOOP"}) client_at(slow, {"EHLO me"}).send(last + std::string("\r\n"));
    assert(slow.wait_ended(2, 5s) && slow.client_errors().empty());
    client_at(slow, {"EHLO me", "MAIL FROM:<a@b>", "RSET"});
    assert(slow.wait_ended(3, 5s) && slow.client_errors() == strings{"left without QUIT"});
    // So may one that got 421.
    slow.clear();
    slow.fault("RSET").reply("421 4.3.2 shutting down");
    client_at(slow, {"EHLO me", "RSET"});
    assert(slow.wait_ended(1, 5s) && slow.client_errors().empty());
}

void test_drops() {
    mail_fixture mail;
    mail.faults("greeting=1=drop greeting=1=drop-after greeting=1=drop-middle MAIL=drop-middle DATA=drop-at:1000");
    assert(client(mail.port()).rest() == "");
    const std::string whole = client(mail.port()).rest();
    assert(whole.substr(0, 4) == "220 " && whole.substr(whole.size() - 2) == "\r\n");
    assert(client(mail.port()).rest() == whole.substr(0, whole.size() / 2));
    assert(client_at(mail, {"HELO x"}).say("MAIL FROM:<a@b>") == "250 ");
    mail.clear_faults();
    mail.fault("DATA").drop_at(1000);
    client it = client_at(mail, to_data);
    it.send(std::string(999, 'x'));
    assert(it.only(""));
    it.send("xx");
    mail.wait_ended(5, 5s);
    assert(mail.connections()[4].ended == "dropped" && mail.messages().empty());
}

void test_replies_out_of_shape() {
    mail_fixture mail;
    mail.fault("NOOP").malformed().times(1);
    mail.fault("NOOP").lf_only().times(1);
    mail.fault("NOOP").huge().times(1);
    mail.fault("NOOP").huge(1000).reply("450 x").times(1);
    mail.fault("NOOP").multiline(3).times(1);
    mail.fault("NOOP").byte_by_byte().times(1);
    mail.fault("NOOP").raw("x").huge().times(1);
    mail.fault("NOOP").raw("250 a\rb\r\n").times(1);
    mail.fault("NOOP").reply("what").times(1);
    mail.fault("NOOP").reply("250").times(1);
    mail.fault("NOOP").half().times(1);
    client it = client_at(mail, {});
    assert(it.say("NOOP") == "no code: 250 OK");
    it.send("NOOP\r\n");
    assert(it.only("250 OK\n"));
    const std::string huge = it.say("NOOP");
    assert(huge.size() == 102400 - 2 && huge.substr(0, 7) == "250 OK " && huge.back() == 'x');
    assert(it.say("NOOP") == "450 x " + std::string(1000 - 8, 'x'));
    assert(it.say("NOOP") == "250-line 1\n250-line 2\n250-line 3\n250 OK");
    assert(it.say("NOOP") == "250 OK");
    it.send("NOOP\r\n");
    assert(it.only("x"));
    it.send("NOOP\r\n");
    assert(it.only("250 a\rb\r\n"));
    assert(it.say("NOOP") == "what" && it.say("NOOP") == "250 as told");
    it.send("NOOP\r\nNOOP\r\n");
    assert(it.only("250 "));
}

void test_byte_by_byte() {
    mail_fixture mail;
    mail.fault("greeting").raw("220 x\r\n").byte_by_byte(20ms);
    client it(mail.port());
    char bytes[10];
    std::size_t calls = 0;
    for (std::size_t got = 0; got < 7; ++calls)
        got += static_cast<std::size_t>(::recv(it.fileno(), bytes, sizeof bytes, 0));
    assert(calls > 1);   // a busy machine may take some of them together
    assert(it.say("NOOP") == "250 OK");
}

void test_early_354() {
    mail_fixture mail;
    mail.fault("RCPT").early_354();
    client it = client_at(mail, to_rcpt);
    assert(it.say("RCPT TO:<c@d>") == "250 OK" && it.hear() == "354 too early");
    it.send("DATA\r\n");
    assert(it.only(""));
    assert(it.say("x\r\n.") == "250 OK" && mail.messages().size() == 1);
}

void test_stop_reading() {
    mail_fixture mail;
    mail.fault("DATA").stop_reading();
    client it = client_at(mail, to_data);
    const timeval moment{0, 50000};
    ::setsockopt(it.fileno(), SOL_SOCKET, SO_SNDTIMEO, &moment, sizeof moment);
    bool stuck = false;
    try {
        for (int i = 0; i < 100; ++i) it.send(std::string(1 << 20, 'x'));
    } catch (const std::system_error& error) {
        stuck = error.code().value() == EAGAIN;
    }
    assert(stuck);
}

void test_faults_from_text() {
    mail_fixture mail;
    mail.faults(
        "RCPT=1=451 4.3.0 try again, please RCPT:bob@*=550 EHLO=delay:1ms,lines:2 NOOP=3-=drop VRFY=50%=slow:2ms,553 "
        "a, b");
    mail.faults("rset=0=450");
    mail.faults("");
    client it = client_at(mail, {});
    assert(has(it.say("EHLO x"), "250-line 1\n250-line 2\n250-localhost\n"));
    it.say("MAIL FROM:<x@y>");
    assert(it.say("RCPT TO:<al@x>") == "451 4.3.0 try again, please");
    assert(it.say("RSET").substr(0, 3) == "450" && it.say("RSET").substr(0, 3) == "450");
    assert(it.say("RCPT TO:<al@x>") == "250 OK" && it.say("RCPT TO:<bob@x>").substr(0, 3) == "550");
    int refused = 0;
    for (int i = 0; i < 20; ++i) refused += it.say("VRFY a@b") == "553 a, b";
    assert(refused > 3 && refused < 17);
    assert(it.say("NOOP") == "250 OK" && it.say("NOOP") == "250 OK" && it.say("NOOP") == "");
    for (const char* bad : {"x", "=451", "A=", "A=nothing", "A=delay", "A=delay:2", "A=delay:xs", "A=huge:x",
                            "A=2=", "A=1234567890=drop"}) {
        bool thrown = false;
        try {
            mail.faults(bad);
        } catch (const std::invalid_argument& error) {
            thrown = *error.what() != 0;
        }
        assert(thrown);
    }
}

void test_EHLO_words() {
    mail_fixture::options with;
    with.offer = {"PIPELINING", "X-FOO bar"};
    with.hide = {"SIZE", "HELP"};
    mail_fixture mail(with);
    client it = client_at(mail, {});
    assert(it.say("EHLO x") == "250-localhost\n250-8BITMIME\n250-PIPELINING\n250 X-FOO bar");
    assert(it.say("HELO x") == "250 localhost" && it.say("AUTH PLAIN").substr(0, 3) == "500");
    assert(it.say("EHLO again") == "250-localhost\n250-8BITMIME\n250-PIPELINING\n250 X-FOO bar");   // RFC 5321 lets it
    it.send("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n");
    assert(it.hear() == "250 OK" && it.hear() == "250 OK" && it.hear().substr(0, 3) == "354");
    it.say("x\r\n.");
    assert(mail.client_errors().size() == 1);   // AUTH
    it.send("NOOP\r\nNOOP\r\n");                // which may only stand last
    it.hear(), it.hear();
    assert(mail.client_errors()[1] == "it does not wait for the reply to NOOP");
}

// A login by all mechanisms: the replies' codes.
strings log_in(mail_fixture& mail, const std::string& user, const std::string& password) {
    using fixture::base64;
    client one = client_at(mail, {"EHLO x"}), two = client_at(mail, {"EHLO x"}), three = client_at(mail, {"EHLO x"});
    strings codes{one.say("AUTH PLAIN " + base64(std::string(1, '\0') + user + std::string(1, '\0') + password))};
    two.say("AUTH LOGIN"), two.say(base64(user));
    codes.push_back(two.say(base64(password)));
    const std::string challenge = *fixture::from_base64(three.say("AUTH CRAM-MD5").substr(4));
    codes.push_back(three.say(base64(user + " " + fixture::hmac_md5(password, challenge))));
    for (std::string& it : codes) it = it.substr(0, 3);
    return codes;
}

void test_AUTH() {
    assert(fixture::hmac_md5("tanstaaftanstaaf", "<1896.697170952@postoffice.reston.mci.net>") ==
           "b913a602c7eda7a495b4e6e7334d3890");   // RFC 2195
    assert(fixture::hmac_md5(std::string(80, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First") ==
           "6b1ab7fe4bd7bf8f0b62e6ce61b9d0cd");   // RFC 2202
    for (const std::string& bytes : strings{"", "a", "ab", "abc", "\xff\xfe\xfd\xfc"})
        assert(fixture::from_base64(fixture::base64(bytes)) == bytes);

    mail_fixture::options with;
    with.auth = {"PLAIN", "LOGIN", "CRAM-MD5"};
    with.users = {{"user", "secret"}};
    with.auth_required = true;
    const strings yes(3, "235"), no(3, "535"), gone(3, "");
    for (const auto who :
         {fixture::logins::anybody, fixture::logins::listed, fixture::logins::nobody, fixture::logins::broken_off}) {
        with.who = who;
        mail_fixture mail(with);
        const strings any = who == fixture::logins::anybody ? yes : who == fixture::logins::broken_off ? gone : no;
        assert(log_in(mail, "user", "secret") == (who == fixture::logins::listed ? yes : any));
        assert(log_in(mail, "user", "wrong") == any && log_in(mail, "eve", "secret") == any &&
               log_in(mail, "eve", "") == any);
    }
    with.who = fixture::logins::listed;
    mail_fixture mail(with);
    client it = client_at(mail, {});
    for (const auto& [line, reply] : std::vector<std::pair<std::string, std::string>>{
             {"AUTH PLAIN", "503"},
             {"EHLO x", "250-localhost\n250-SIZE 33554432\n250-8BITMIME\n250-AUTH PLAIN LOGIN CRAM-MD5\n250 HELP"},
             {"MAIL FROM:<a@b>", "530"},
             {"AUTH", "504"},
             {"AUTH X", "504"},
             {"AUTH PLAIN", "334 "},
             {"*", "501"},
             {"AUTH PLAIN =", "501"},
             {"AUTH PLAIN QQ=", "501"},
             {"AUTH PLAIN AAAA", "535"},
             {"AUTH PLAIN QUJD", "501"},
             {"AUTH CRAM-MD5 QUJD", "501"},
             {"AUTH CRAM-MD5", "334 "},
             {"QUJD", "535"},
             {"AUTH PLAIN " + std::string(12276, 'A'), "535"},
             {"AUTH PLAIN " + std::string(12288, 'A'), "500"},
             {"AUTH LOGIN", "334 VXNlcm5hbWU6"},
             {std::string(12288, 'A'), "334 UGFzc3dvcmQ6"},
             {std::string(12288, 'A'), "535"},
             {"AUTH LOGIN", "334 "},
             {std::string(1000000, 'A'), "500"},
             {"NOOP", "250"},
             {"AUTH plain AHVzZXIAc2VjcmV0", "235"},
             {"AUTH PLAIN", "503"},
             {"MAIL FROM:<a@b>", "250"}})
        assert(it.say(line).substr(0, reply.size()) == reply);

    mail.fault("AUTH").reply("454 4.7.0 later").times(1);
    mail.fault("AUTH+").drop().times(1);
    client other = client_at(mail, {"EHLO x"});
    assert(other.say("AUTH LOGIN") == "454 4.7.0 later" && other.say("AUTH LOGIN").substr(0, 3) == "334" &&
           other.say("dXNlcg==") == "");
    assert(client_at(mail, {"EHLO x"}).say("AUTH PLAIN AHVzZXIAc2VjcmV0").substr(0, 3) == "235");
    mail_fixture without;
    assert(client_at(without, {"EHLO x"}).say("AUTH PLAIN").substr(0, 3) == "500");
}

// What a client is blamed for that says this after the greeting.
strings errors_of(const std::string& bytes, const fixture::options& with = {}) {
    mail_fixture mail(with);
    client it(mail.port());
    it.hear();
    // Line by line, as a good client does. "|" in front of a line: it comes with the line before it; "+": the same, and
    // each of the two is answered.
    std::string packet;
    int replies = 1;
    for (std::size_t at = 0; at < bytes.size();) {
        const std::size_t end = std::min(bytes.find("\r\n", at) + 2, bytes.size());
        packet += bytes.substr(at, end - at);
        at = end;
        if (at < bytes.size() && (bytes[at] == '|' || bytes[at] == '+')) {
            replies += bytes[at++] == '+';
            continue;
        }
        it.send(packet);
        packet.clear();
        for (; replies > 0; --replies) it.hear();
        replies = 1;
    }
    ::shutdown(it.fileno(), SHUT_WR);
    it.rest();
    assert(mail.wait_ended(1, 5s));
    return mail.client_errors();
}

void test_what_the_client_did_wrong() {
    const std::string begin = "EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n", end = "\r\n|.\r\nQUIT\r\n";
    const auto of_message = [&](const std::string& text) { return errors_of(begin + text + end); };
    assert(of_message("Subject: x\r\n|\r\n|..x\r\n|") == strings{});
    assert(of_message("one\r\n|two\nthree\nfour") == strings{"bare LF in line 2 of the message"});
    assert(of_message("one\r\n|two\rthree") == strings{"bare CR in line 2 of the message"});
    assert(of_message("one\r") == strings{"bare CR in line 1 of the message"});
    assert(of_message("one\r\n|\xc3\xbc") == strings{"8-bit data without BODY=8BITMIME in line 2 of the message"});
    assert(of_message(std::string(998, 'x')) == strings{});
    assert(of_message(std::string(999, 'x')) == strings{"more than 998 bytes in line 1 of the message"});
    assert(of_message(".x\r\n|y") == strings{"a dot that is not doubled in line 1 of the message"});
    assert(errors_of("EHLO x\r\nMAIL FROM:<a@b> BODY=8BITMIME\r\nRCPT TO:<c@d>\r\nDATA\r\n\xc3\xbc" + end) ==
           strings{});
    // A message that goes on behind the dot that was not doubled.
    const strings cut = errors_of(begin + "one\r\n|.\r\n+two\r\nQUIT\r\n");
    assert(cut.size() == 2 && cut[0] == "it does not wait for the reply to ., and PIPELINING was not offered");
    assert(cut[1].find("no command, is a dot in the message not doubled? two: 500 ") == 0);

    assert(errors_of("NOOP\nNOOP\r\nQUIT\r\n")[0] == "bare LF in a command");
    assert(errors_of("NO\rOP\r\nQUIT\r\n")[0] == "bare CR in a command");
    fixture::options utf8;
    utf8.server.enable_SMTPUTF8 = true;
    assert(errors_of("EHLO x\r\nMAIL FROM:<\xc3\xbc@b>\r\nRSET\r\nQUIT\r\n", utf8) ==
           strings{"bytes that are not ASCII, without SMTPUTF8: MAIL FROM:<\\xc3\\xbc@b>"});
    assert(errors_of("EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<\xc3\xbc@d>\r\nQUIT\r\n", utf8).size() == 1);
    assert(errors_of("EHLO x\r\nMAIL FROM:<\xc3\xbc@b> SMTPUTF8\r\nRCPT TO:<\xc3\xbc@d>\r\nQUIT\r\n", utf8) ==
           strings{});
    assert(errors_of("MAIL FROM:<a@b>\r\nEHLO x\r\nRCPT TO:<a@b>\r\nDATA\r\nQUIT\r\n") ==
           (strings{"before its turn: MAIL FROM:<a@b>", "before its turn: RCPT TO:<a@b>", "before its turn: DATA"}));
    assert(errors_of("EHLO x\r\nMAIL FROM:<a@b>\r\nMAIL FROM:<a@b>\r\nRSET\r\nMAIL FROM:<a@b>\r\nQUIT\r\n") ==
           strings{"RSET is missing before MAIL FROM:<a@b>"});
    assert(errors_of("EHLO x\r\nFOO\r\nMAIL FROM a\r\nQUIT\r\n").size() == 2);
    assert(errors_of("EHLO x\r\nMAIL FROM:<a@b>\r\n+RCPT TO:<c@d>\r\nQUIT\r\n") ==
           strings{"it does not wait for the reply to MAIL, and PIPELINING was not offered"});
    assert(errors_of(begin.substr(0, begin.size() - 6) + "DATA\r\n+x" + end) ==
           strings{"it does not wait for the reply to DATA, and PIPELINING was not offered"});
    assert(errors_of("EHLO x\r\n") == strings{"left without QUIT"});
    assert(errors_of("EHLO x\r\nQUIT\r\n|NOOP\r\n") == strings{"it says more after QUIT"});
    fixture::options hidden;
    hidden.hide = {"8BITMIME", "SIZE"};
    assert(errors_of("EHLO x\r\nMAIL FROM:<a@b> SIZE=3 BODY=8BITMIME\r\nQUIT\r\n", hidden) ==
           (strings{"SIZE=3 in MAIL, which EHLO did not offer", "BODY=8BITMIME in MAIL, which EHLO did not offer"}));
    mail_fixture late;
    late.fault("greeting").delay(200ms);
    client it(late.port());
    it.send("EHLO x\r\n");
    it.hear();
    assert(late.client_errors() == strings{"it speaks before the greeting"});
}

void test_scenario() {
    mail_fixture mail;
    const std::string text =
        "# the first connection\n  S: 220-hello\nS: 220 there\r\nC: EHLO *\nS: 250 x\nwait 5ms\nC: MAIL FROM:<a@*\n"
        "S: 250 ok\nC: RCPT TO:<c@d>\nS 250\nwait 1ms\nS:  ok\nC: DATA\nS: 354 go\nC: **\nC: .\nS: 250 taken\nC: *\n"
        "close\n---\n\nS: 421 not now\nclose\n";
    mail.play(text);
    assert(code(mail) == 250);
    assert(mail.wait_ended(1, 5s));
    assert(mail.difference(1ms) == "connection 2 of the scenario has not come to its end");
    assert(code(mail) == 421);
    assert(mail.difference(5s) == "");
    assert(has(mail.transcript(), "# connection 1, dropped\nS: 220-hello\nS: 220 there\nC: EHLO "));
    assert(code(mail) != 250 && has(mail.difference(5s), "+ a connection too many\n"));

    mail.play("");
    assert(code(mail) == 250 && mail.difference(1ms) == "");

    const std::string path = "fixture_test." + std::to_string(::getpid()) + ".scenario";
    std::ofstream(path) << text;
    mail.play_file(path);
    std::remove(path.c_str());
    assert(code(mail) == 250 && code(mail) == 421 && mail.difference(5s) == "");
}

void test_scenario_departed_from() {
    mail_fixture mail;
    const std::string text = "S: 220 x\nC: EHLO *\nS: 250 x\nC: MAIL FROM:<other@b>*\nS: 250 ok\n";
    mail.play(text);
    assert(code(mail) != 250);
    const std::string difference = mail.difference(5s);
    assert(difference.find("connection 1 departs from the scenario:\n  S: 220 x\n  C: EHLO ") == 0);
    assert(has(difference, "\n  S: 250 x\n- C: MAIL FROM:<other@b>*\n+ C: MAIL FROM:<a@b>\n"));
    mail.play(text);
    client(mail.port()).say("EHLO me");
    assert(has(mail.difference(5s), "- C: MAIL FROM:<other@b>*\n+ (the client has left)\n"));
    mail.play("S: 220 x\nC: NOOP\nS: 250 x\n");
    client it(mail.port());
    it.hear(), it.say("NOOP"), it.send("NOOP\n");
    assert(it.rest() == "" && mail.wait_ended(3, 5s));
    assert(has(mail.difference(5s), "- (nothing more)\n+ C: NOOP\n") &&
           mail.client_errors() == strings{"bare LF in NOOP"});
    for (const char* bad : {"X: y", "wait", "wait soon", "close now?"}) {
        bool thrown = false;
        try {
            mail.play(bad);
        } catch (const std::invalid_argument&) {
            thrown = true;
        }
        assert(thrown);
    }
}

// The seam for TLS, with a "TLS" that flips each bit.
struct flipped : asyncore::socket_type {
    explicit flipped(asyncore::socket_type&& plain) : socket_type(std::move(plain)) {}
    static std::string flip(std::string_view text) {
        std::string all(text);
        for (char& c : all) c = static_cast<char>(~c);
        return all;
    }
    std::size_t recv(char* buffer, std::size_t size, int flags = 0) override {
        const std::size_t got = socket_type::recv(buffer, size, flags);
        flip({buffer, got}).copy(buffer, got);
        return got;
    }
    std::size_t send(std::string_view data, int flags = 0) override { return socket_type::send(flip(data), flags); }
};

void test_TLS_comes_from_outside() {
    fixture::options with;
    with.tls = [](asyncore::socket_type&& plain) { return std::make_unique<flipped>(std::move(plain)); };
    with.auth = {"PLAIN"};
    with.auth_needs_tls = true;
    mail_fixture mail(with);
    client it = client_at(mail, {});
    const std::string clear = it.say("EHLO x");
    assert(has(clear, "STARTTLS") && !has(clear, "AUTH") && it.say("AUTH PLAIN AGEAYg==").substr(0, 3) == "538");
    it.send("STARTTLS\r\nMAIL FROM:<injected@x>\r\n");
    assert(it.hear() == "220 Ready to start TLS");
    const auto secret = [&](const std::string& line, std::size_t size) {
        it.send(flipped::flip(line + "\r\n"));
        std::string reply(size, 0);
        for (char& c : reply) assert(::recv(it.fileno(), &c, 1, 0) == 1);
        return flipped::flip(reply);
    };
    assert(secret("MAIL FROM:<a@b>", 28) == "503 Error: send HELO first\r\n");
    const std::string words = "250-localhost\r\n250-SIZE 33554432\r\n250-8BITMIME\r\n250-AUTH PLAIN\r\n250 HELP\r\n";
    assert(secret("EHLO x", words.size()) == words);
    assert(secret("AUTH PLAIN AGEAYg==", 37) == "235 2.7.0 Authentication successful\r\n");
    secret("MAIL FROM:<a@b>", 8), secret("RCPT TO:<c@d>", 8), secret("DATA", 37), secret("x\r\n.", 8);
    assert(mail.messages().at(0).tls && mail.messages()[0].user == "a" && mail.messages()[0].mailfrom == "a@b");
    assert(mail.connections()[0].tls && mail.client_errors()[0] == "it says more after STARTTLS, before TLS");

    with.tls_at_once = true;
    mail_fixture smtps(with);
    client at_once(smtps.port());
    char first[4];
    assert(::recv(at_once.fileno(), first, 4, MSG_WAITALL) == 4 && flipped::flip({first, 4}) == "220 ");
}

void test_IPv6_and_UNIX() {
    const std::string path = "fixture_test." + std::to_string(::getpid());
    fixture::options with;
    for (const auto& where : {asyncore::address("::1", 0), asyncore::address::unix_path(path)}) {
        with.where = where;
        try {
            mail_fixture mail(with);
            smtpd::sendmail(mail.address(), "a@b", {"c@d"}, "x", smtpd::timeouts::all(5s));
            assert(mail.messages().size() == 1);
        } catch (const std::system_error&) {
            assert(where.host == "::1");   // not every machine has IPv6
        }
    }
    std::remove(path.c_str());
}

void test_a_large_message() {
    mail_fixture mail;
    const std::string text = [] {
        std::string all;
        while (all.size() < 20 << 20) all += std::string(70, 'x') + "\n";
        return all;
    }();
    smtpd::sendmail({"127.0.0.1", mail.port()}, "a@b", {"c@d"}, text, smtpd::timeouts::all(30s));
    assert(mail.messages().at(0).data.size() + 1 == text.size() && mail.client_errors().empty());
}

int main() {
    int passed = 0;
    for (const auto test : {test_welcome_mail,
                            test_a_shop_that_tries_again,
                            test_wait_has_an_end,
                            test_many_senders_and_two_servers,
                            test_stop_never_hangs,
                            test_what_is_known_of_a_message,
                            test_clear,
                            test_transcript,
                            test_how_connections_end,
                            test_a_fault_at_every_step,
                            test_which_address_and_how_often,
                            test_chance,
                            test_delay_and_silence,
                            test_drops,
                            test_replies_out_of_shape,
                            test_byte_by_byte,
                            test_early_354,
                            test_stop_reading,
                            test_faults_from_text,
                            test_EHLO_words,
                            test_AUTH,
                            test_what_the_client_did_wrong,
                            test_scenario,
                            test_scenario_departed_from,
                            test_TLS_comes_from_outside,
                            test_IPv6_and_UNIX,
                            test_a_large_message}) {
        test();
        ++passed;
    }
    std::cout << passed << " tests passed" << std::endl;
}
