// mail_fixture with TLS: a test of a program that sends mail by STARTTLS, with a login, or by SMTPS. tls.hpp lends the
// fixture its sockets; there is no code for a server in here. Usage: tls_fixture CERT KEY OTHER, where OTHER is a
// certificate that did not sign CERT. How to make them: see tls_server.cpp, or let CMake do it before the tests:
//
//     execute_process(COMMAND openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext
//         subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout ${CMAKE_BINARY_DIR}/key.pem -out
//         ${CMAKE_BINARY_DIR}/cert.pem)
//
// Link with smtpd.cpp, asyncore.cpp, -lssl -lcrypto -pthread.
#undef NDEBUG
#include "fixture.hpp"
#include "tls.hpp"

#include <cassert>
#include <iostream>

using namespace std::chrono_literals;
using strings = std::vector<std::string>;

namespace {

std::string cert, key, other;

// The code under test: what the server said to the message, or what stopped it; -1 when that is no reply.
struct sender {
    int port = 0;
    tls::mode when = tls::mode::required;
    std::string trusted = cert, password{};   // "": no login
    std::string text = "Subject: Hi\n\nHello\n";

    smtpd::reply send() const {
        asyncore::map_type map;
        tls::session<smtpd::SMTP> session(tls::client_context(trusted), "localhost", when, &map,
                                          smtpd::timeouts::all(10s));
        smtpd::reply result;
        const auto done = [&](const smtpd::reply& answer) {
            result = answer;
            session.quit();
        };
        const auto mail = [&](const smtpd::reply& answer) {
            if (answer.code / 100 != 2) return done(answer);
            session.sendmail("me@example.com", {"you@example.com"}, text, {}, true,
                             [&](const auto& last, const auto&) { done(last); });
        };
        session.open({"127.0.0.1", port}, [&](const smtpd::reply& answer) {
            if (answer.code != 250 || password.empty()) return mail(answer);
            using namespace std::string_literals;
            session.docmd("AUTH PLAIN " + fixture::base64("\0me\0"s + password), mail);
        });
        asyncore::loop(30.0, false, &map);
        return result;
    }
};

// What it takes: one line.
fixture::options with_TLS() {
    fixture::options with;
    with.tls = [c = tls::server_context(cert, key)](asyncore::socket_type&& s) { return tls::wrap(std::move(s), c); };
    return with;
}

void test_STARTTLS_with_a_login() {
    fixture::options with = with_TLS();
    with.auth = {"PLAIN"};
    with.auth_needs_tls = with.auth_required = true;
    with.who = fixture::logins::listed;
    with.users = {{"me", "secret"}};
    mail_fixture mail(with);
    sender it{mail.port()};
    assert(it.send().code == 530);
    it.password = "wrong";
    assert(it.send().code == 535 && mail.messages().empty());
    it.password = "secret";
    assert(it.send().code == 250 && mail.messages().size() == 1);
    const auto message = mail.messages()[0];
    assert(message.tls && message.user == "me" && message.data == "Subject: Hi\n\nHello");
    assert(mail.wait_ended(3, 5s) && mail.connections()[2].tls && mail.connections()[2].ended == "quit");
    assert(mail.client_errors().empty());
    // Both halves of the conversation are known, and AUTH is offered in the second one alone.
    const strings lines = mail.connections()[2].transcript;
    const auto at = [&](const std::string& line) { return std::find(lines.begin(), lines.end(), line); };
    assert(at("S: 250-STARTTLS") < at("C: STARTTLS") && at("C: STARTTLS") < at("S: 250-AUTH PLAIN"));
    assert(at("S: 250-AUTH PLAIN") < at("C: QUIT") && at("C: QUIT") < lines.end());
}

void test_SMTPS() {
    fixture::options with = with_TLS();
    with.tls_at_once = true;
    mail_fixture mail(with);
    assert(sender({mail.port(), tls::mode::at_once}).send().code == 250);
    mail.fault("greeting").delay(100ms);
    assert(sender({mail.port(), tls::mode::at_once}).send().code == 250);
    assert(mail.messages().size() == 2 && mail.messages()[0].tls && mail.messages()[1].tls);
    assert(mail.wait_ended(2, 5s) && mail.client_errors().empty());
    assert(mail.transcript().find("STARTTLS") == std::string::npos);
}

void test_faults_when_all_is_encrypted() {
    mail_fixture mail(with_TLS());
    sender it{mail.port()};
    mail.fault("RCPT").address("you@*").reply("451 later").times(1);
    assert(it.send().code == 451 && it.send().code == 250);
    mail.fault("MAIL").byte_by_byte();
    mail.fault("DATA").multiline(5).delay(50ms);
    assert(it.send().code == 250 && mail.messages().size() == 2 && mail.wait_ended(3, 5s));
    assert(mail.client_errors().empty());

    mail.clear(), mail.clear_faults();
    mail.fault("STARTTLS").reply("454 not now").times(1);
    assert(it.send().code == -1);   // TLS is required
    mail.fault(".").drop().times(1);
    assert(it.send().code == -1);
    mail.fault("DATA").drop_at(1000).times(1);
    it.text.append(100000, 'x');
    assert(it.send().code == -1 && mail.wait_ended(3, 5s));
    const auto all = mail.connections();
    assert(!all[0].tls && all[1].tls && all[1].ended == "dropped" && all[2].tls && all[2].ended == "dropped");
    assert(mail.messages().empty());
}

void test_a_large_message() {
    mail_fixture mail(with_TLS());
    sender it{mail.port()};
    while (it.text.size() < 5 << 20) it.text += std::string(70, 'x') + "\n.\n";
    assert(it.send().code == 250 && mail.messages()[0].data + "\n" == it.text && mail.client_errors().empty());
}

// A client that trusts somebody else goes away, and the next one is served.
void test_a_certificate_that_is_not_trusted() {
    for (const bool at_once : {false, true}) {
        fixture::options with = with_TLS();
        with.tls_at_once = at_once;
        mail_fixture mail(with);
        sender it{mail.port(), at_once ? tls::mode::at_once : tls::mode::required};
        it.trusted = other;
        const auto answer = it.send();
        assert(answer.code == -1 && answer.text.find("certificate verify failed") != std::string::npos);
        assert(mail.wait_ended(1, 5s) && mail.messages().empty());
        assert(mail.connections()[0].ended == "left" && mail.client_errors().empty());   // QUIT was no longer possible
        assert(mail.transcript().find("unknown ca") != std::string::npos);
        it.trusted = cert;
        assert(it.send().code == 250 && mail.messages().size() == 1);
    }
}

// A client that speaks no TLS where it must, and one that says nothing: the fixture ends all the same.
void test_clients_without_TLS() {
    fixture::options with = with_TLS();
    with.tls_at_once = true;
    mail_fixture mail(with);
    asyncore::socket_type silent(AF_INET, SOCK_STREAM), plain(AF_INET, SOCK_STREAM);
    for (asyncore::socket_type* it : {&silent, &plain}) {
        it->setblocking(true);
        assert(it->connect_ex({"127.0.0.1", mail.port()}) == 0);
    }
    plain.send("EHLO x\r\n");
    assert(mail.wait_ended(1, 5s) && mail.connections().size() == 2);
    mail.stop();
    assert(mail.connections()[0].ended == "stopped" && mail.messages().empty());
}

}   // namespace

int main(int argc, char** argv) {
    if (argc != 4) return std::cerr << "usage: tls_fixture CERT KEY OTHER\n", 2;
    cert = argv[1], key = argv[2], other = argv[3];
    int passed = 0;
    for (const auto test : {test_STARTTLS_with_a_login, test_SMTPS, test_faults_when_all_is_encrypted,
                            test_a_large_message, test_a_certificate_that_is_not_trusted, test_clients_without_TLS}) {
        test();
        ++passed;
    }
    std::cout << passed << " tests passed" << std::endl;
}
