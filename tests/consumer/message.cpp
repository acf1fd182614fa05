// A message goes through the library, from a client to a server in one loop; what each consumer project builds.
// The program has functions named poll and loop of its own, as many programs have.

#include <iostream>

#include "smtpd.hpp"

struct inbox : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::vector<std::string> messages;
    std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                               const std::vector<std::string>&, std::string&& data,
                                               const smtpd::message_options&) override {
        messages.push_back(std::move(data));
        return std::nullopt;
    }
};

// Says its lines in turn, one for each reply.
struct sender : asynchat::async_chat {
    std::vector<std::string> lines{
        "HELO consumer", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "It works.\r\n.", "QUIT"};
    std::size_t said = 0;

    explicit sender(const asyncore::address& server) {
        set_terminator("\r\n");
        create_socket();
        connect(server);
    }
    void collect_incoming_data(std::string_view) override {}
    void found_terminator() override {
        if (said < lines.size()) push(lines[said++] + "\r\n");
    }
};

int passes = 0;

void poll() { ++passes; }

void loop(const inbox& server) {
    for (; server.messages.empty() && passes < 100; poll()) asyncore::loop(1.0, false, nullptr, 1);
}

int main() {
    inbox server({"127.0.0.1", 0}, {});
    sender client(server.socket->getsockname());
    loop(server);
    if (server.messages != std::vector<std::string>{"It works."}) return 1;
    std::cout << "delivered: " << server.messages.front() << '\n';
    return 0;
}
