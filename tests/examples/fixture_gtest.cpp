// mail_fixture with GoogleTest; link with -lgtest -lgtest_main -pthread. A test that fails shows the conversation.
#include <gtest/gtest.h>

#include "fixture.hpp"

using namespace std::chrono_literals;

struct Mail : testing::Test {
    mail_fixture mail;
    void TearDown() override {
        EXPECT_EQ(mail.client_errors(), std::vector<std::string>());
        if (HasFailure()) std::cerr << mail.transcript();
    }
    void send() {
        smtpd::sendmail({"127.0.0.1", mail.port()}, "me@b", {"you@d"}, "Subject: Hi\n\nHi!\n",
                        smtpd::timeouts::all(5s));
    }
};

TEST_F(Mail, Comes) {
    send();
    ASSERT_TRUE(mail.wait_for(1, 5s));
    EXPECT_EQ(mail.messages()[0].mailfrom, "me@b");
}

TEST_F(Mail, IsRefused) {
    mail.fault("RCPT").address("you@*").reply("550 no such user");
    EXPECT_THROW(send(), smtpd::SMTPResponseException);
    EXPECT_FALSE(mail.wait_for(1, 1ms));
}
