// mail_fixture with Catch2, version 2; link with -pthread. A test that fails shows the conversation.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>

#include "fixture.hpp"

using namespace std::chrono_literals;

static void send(int port) {
    smtpd::sendmail({"127.0.0.1", port}, "me@b", {"you@d"}, "Subject: Hi\n\nHi!\n", smtpd::timeouts::all(5s));
}

TEST_CASE("mail") {
    mail_fixture mail;
    SECTION("comes") {
        send(mail.port());
        REQUIRE(mail.wait_for(1, 5s));
        CHECK(mail.messages()[0].mailfrom == "me@b");
    }
    SECTION("is refused") {
        mail.fault("RCPT").address("you@*").reply("550 no such user");
        CHECK_THROWS_AS(send(mail.port()), smtpd::SMTPResponseException);
        CHECK_FALSE(mail.wait_for(1, 1ms));
    }
    INFO(mail.transcript());
    CHECK(mail.client_errors() == std::vector<std::string>{});
}
