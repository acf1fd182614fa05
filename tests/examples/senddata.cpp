// A client: sends one message to the server at 127.0.0.1:1025.
#include <iostream>
#include "smtpd.hpp"

int main() {
    const std::string message =
        "To: Recipient <recipient@example.com>\n"
        "From: Author <author@example.com>\n"
        "Subject: Simple test message\n"
        "\n"
        "This is the body of the message.\n";
    try {
        smtpd::sendmail({"127.0.0.1", 1025}, "author@example.com", {"recipient@example.com"}, message);
    } catch (const smtpd::SMTPResponseException& error) {
        std::cerr << "not sent: " << error.what() << '\n';
        return 1;
    }
}
