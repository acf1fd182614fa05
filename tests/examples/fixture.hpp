// A mail server for tests: it runs in a thread of its own and keeps the messages that it gets.
//
//     mail_fixture mail;                          // listens on a free port of 127.0.0.1
//     send_welcome_mail(mail.port(), "you@example.com");
//     assert(mail.wait_for(1, std::chrono::seconds(5)));
//     assert(mail.messages()[0].rcpttos[0] == "you@example.com");
#ifndef FIXTURE_HPP
#define FIXTURE_HPP

#include <unistd.h>
#include <condition_variable>
#include <mutex>
#include <thread>
#include "smtpd.hpp"

class mail_fixture {
  public:
    struct message {
        std::string mailfrom;
        std::vector<std::string> rcpttos;
        std::string data;
    };
    mail_fixture() : thread_([this] { asyncore::loop(30.0, false, &map_); }) {}
    ~mail_fixture() { stop(); }
    int port() const { return port_; }
    // Waits until n messages have come since the start; false when that takes longer than `most`.
    bool wait_for(std::size_t n, std::chrono::milliseconds most) {
        std::unique_lock<std::mutex> lock(mutex_);
        return came_.wait_for(lock, most, [&] { return messages_.size() >= n; });
    }
    // What has come: a copy, since the thread may be adding to it.
    std::vector<message> messages() const {
        std::lock_guard<std::mutex> lock(mutex_);
        return messages_;
    }
    // Ends the server, whatever its clients are doing. Any thread may call it, and more than once.
    void stop() {
        std::lock_guard<std::mutex> lock(stopping_);
        if (!thread_.joinable()) return;
        while (::write(pipe_.ends[1], "", 1) < 0 && errno == EINTR) continue;
        thread_.join();
    }

  private:
    struct self_pipe {
        int ends[2];
        self_pipe() { if (::pipe(ends) < 0) throw std::system_error(errno, std::generic_category(), "pipe"); }
        ~self_pipe() { ::close(ends[0]), ::close(ends[1]); }
    };
    // Ends the loop by closing all that it waits for.
    struct waker : asyncore::file_dispatcher {
        using file_dispatcher::file_dispatcher;
        bool writable() override { return false; }
        void handle_read() override { asyncore::close_all(_map, true); }
    };
    struct server : smtpd::SMTPServer {
        mail_fixture& fixture;
        explicit server(mail_fixture& it) : SMTPServer({"127.0.0.1", 0}, {}, it.with_), fixture(it) {}
        std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                                   const std::vector<std::string>& rcpttos, std::string&& data,
                                                   const smtpd::message_options&) override {
            std::lock_guard<std::mutex> lock(fixture.mutex_);
            fixture.messages_.push_back({mailfrom, rcpttos, std::move(data)});
            fixture.came_.notify_all();
            return std::nullopt;
        }
    };
    mutable std::mutex mutex_, stopping_;
    std::condition_variable came_;
    std::vector<message> messages_;
    self_pipe pipe_;
    asyncore::map_type map_;   // the thread's own: before all that is registered with it
    smtpd::options with_ = [this] { smtpd::options with; with.map = &map_; return with; }();
    waker waker_{pipe_.ends[0], &map_};
    server server_{*this};
    const int port_ = server_.socket->getsockname().port;
    std::thread thread_;
};
#endif
