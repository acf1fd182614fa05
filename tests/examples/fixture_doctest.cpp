// mail_fixture with doctest; link with -pthread. A test that fails shows the conversation.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "fixture.hpp"

using namespace std::chrono_literals;

static void send(int port) {
    smtpd::sendmail({"127.0.0.1", port}, "me@b", {"you@d"}, "Subject: Hi\n\nHi!\n", smtpd::timeouts::all(5s));
}

TEST_CASE("mail") {
    mail_fixture mail;
    SUBCASE("comes") {
        send(mail.port());
        REQUIRE(mail.wait_for(1, 5s));
        CHECK(mail.messages()[0].mailfrom == "me@b");
    }
    SUBCASE("is refused") {
        mail.fault("RCPT").address("you@*").reply("550 no such user");
        CHECK_THROWS_AS(send(mail.port()), smtpd::SMTPResponseException);
        CHECK_FALSE(mail.wait_for(1, 1ms));
    }
    INFO(mail.transcript());
    CHECK(mail.client_errors().empty());
}
