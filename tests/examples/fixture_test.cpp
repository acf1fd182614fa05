// How a test uses mail_fixture (fixture.hpp): the code under test sends mail, the test looks at what came.
#undef NDEBUG
#include <cassert>
#include <iostream>
#include "fixture.hpp"

using namespace std::chrono_literals;

// The code under test.
void send_welcome_mail(int port, const std::string& to) {
    smtpd::sendmail({"127.0.0.1", port}, "shop@example.com", {to}, "Subject: Welcome\n\nHello!\n", {2s, 2s, 2s, 2s, 2s, 2s, 2s});
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

// A client that has said `text`, and then says no more.
asyncore::socket_type silent_client(int port, const std::string& text) {
    asyncore::socket_type sock(::socket(AF_INET, SOCK_STREAM, 0));
    assert(sock.connect_ex({"127.0.0.1", port}) == 0);
    sock.send(text);
    return sock;
}

void test_stop_never_hangs() {
    const std::string in_data = "HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nhalf a mess";
    for (int i = 0; i < 50; ++i) {
        mail_fixture mail;
        const auto idle = silent_client(mail.port(), "HELO x\r\n"), busy = silent_client(mail.port(), in_data);
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
    }
}

int main() {
    test_welcome_mail();
    test_wait_has_an_end();
    test_many_senders_and_two_servers();
    test_stop_never_hangs();
    std::cout << "4 tests passed" << std::endl;
}
