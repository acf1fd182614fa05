// Answers that come later: each message gets its 250 two seconds after it came, and nobody else waits meanwhile.
// What is a timer here may be any event of the loop. Usage: deferred [PORT [MILLISECONDS]]
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include "smtpd.hpp"

class SlowServer : public smtpd::SMTPServer {
  public:
    using SMTPServer::SMTPServer;
    std::chrono::milliseconds delay{2000};

    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>&, std::string&&,
                                               const smtpd::message_options& kwargs) override {
        waiting_.emplace_back(asyncore::clock::now() + delay, kwargs.defer());
        std::cout << "message from " << mailfrom << ", " << waiting_.size() << " wait" << std::endl;
        return std::nullopt;   // ignored: the answer is waiting_'s now
    }

    // The loop asks for the next deadline before it waits, and calls handle_timeout() when it has passed. The
    // base class has deadlines of its own.
    asyncore::clock::time_point deadline() override {
        const auto due = SMTPServer::deadline();
        return waiting_.empty() ? due : std::min(due, waiting_.front().first);
    }
    void handle_timeout() override {
        if (SMTPServer::deadline() <= asyncore::clock::now()) SMTPServer::handle_timeout();
        while (!waiting_.empty() && waiting_.front().first <= asyncore::clock::now()) {
            const smtpd::deferred_reply reply = waiting_.front().second;
            waiting_.pop_front();
            reply.answer("250 OK, at last");   // harmless when the client has gone
        }
    }

  private:
    std::deque<std::pair<asyncore::clock::time_point, smtpd::deferred_reply>> waiting_;
};

int main(int argc, char** argv) {
    SlowServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
    if (argc > 2) server.delay = std::chrono::milliseconds(std::atoi(argv[2]));
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
