// A mail server that follows a script, good or bad, and keeps what it is told; and a client that talks to the
// proxy in front of it. All of them may share one map and one thread.

#ifndef UPSTREAM_HPP
#define UPSTREAM_HPP

#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "support.hpp"

namespace support {

// What the server does when it is its turn.
struct act {
    enum ending { stay, hang_up, reset };

    std::string bytes;          // it sends these
    bool slow = false;          // one byte in each pass
    bool silent = false;        // it never answers
    bool held = false;          // it answers when release() is called
    bool well_formed = false;   // one answer as RFC 5321 has it: the session is expected to end properly
    ending then = stay;

    act slowly() const {
        return with([](act& it) { it.slow = true; });
    }
    act then_hangs_up() const {
        return with([](act& it) { it.then = hang_up; });
    }
    act when_released() const {
        return with([](act& it) { it.held = true; });
    }

  private:
    template <typename Change>
    act with(Change change) const {
        act copy = *this;
        change(copy);
        return copy;
    }
};

act says(const std::string& answer);   // a proper one; CR LF is added
act sends(const std::string& bytes);   // anything
act says_nothing();
act hangs_up();
act resets();   // the connection, so that the other side gets ECONNRESET

class upstream : public asyncore::dispatcher {
  public:
    struct mail {
        std::string mailfrom;               // the whole MAIL line
        std::vector<std::string> rcpttos;   // those that were accepted, without TO: and brackets
        std::string wire;                   // as it came, without the last dot
        std::string data;                   // the same without the doubled dots
        std::string told;                   // what was answered
        bool accepted = false;              // that was a 2yz, or began with a whole one
        std::size_t connection = 0;
    };

    std::vector<std::string> extensions{"SIZE 33554432", "8BITMIME"};
    bool lmtp = false;                               // an answer for each recipient after the message
    std::map<std::string, std::deque<act>> script;   // by line or verb; each act is used once
    std::map<std::string, act> always;               // the same, for good
    // Stages that are no verbs: "greeting", "body" (the first line has come), "end" (the last dot has come; for
    // LMTP also "end ADDRESS").

    std::deque<std::vector<std::string>> heard;   // the lines of each connection; "(message)" for a message
    std::deque<mail> messages;                    // that came with their last dot
    std::vector<std::string> complaints;          // where its client was wrong; see check()

    explicit upstream(asyncore::map_type& map, const std::string& host = loopback());
    ~upstream() override;
    std::string class_name() const override { return "upstream"; }
    bool writable() override { return false; }
    void handle_accepted(std::unique_ptr<asyncore::socket_type> conn, const asyncore::address& from) override;

    int port() const { return port_; }
    asyncore::address where() const { return {host_, port_}; }
    void refuse();   // connections to its port are refused from now on
    void accept_again();
    std::size_t open() const { return sessions_.size(); }   // connections
    std::size_t held() const { return held_.size(); }       // answers that wait for release()
    void release();                                         // the oldest of them is sent
    void hang_up();                                         // on everybody
    void say_unasked(const std::string& bytes);             // to everybody

    std::string conversation(std::size_t connection) const;   // its lines, joined by " / "
    std::string conversations() const;                        // of all connections, for a failure's text
    std::size_t accepted(std::string_view text) const;        // messages with that text that were told 250

    // Throws when a client of this server has broken the protocol: more than one command at a time, a MAIL inside
    // a transaction, a line end that is not CR LF, a connection that ends without QUIT though all went well.
    void check() const;

  private:
    class session;
    act next(const std::string& line, const std::string& stage, const std::string& usual);

    const std::string host_;
    int port_ = 0;
    asyncore::socket_type placeholder_;   // keeps the port while connections are refused
    std::vector<session*> sessions_;
    std::deque<session*> held_;
};

// A client in the loop of the server it talks to.
class caller : public asyncore::dispatcher {
  public:
    std::string received;   // and not taken yet
    bool eof = false;

    caller(asyncore::map_type& map, const asyncore::address& server, bool use_poll = false);
    caller(smtpd::SMTPServer& server, bool use_poll);   // over a UNIX socket that the server has accepted
    std::string class_name() const override { return "caller"; }

    void say(std::string_view bytes);
    std::string answer();                       // the next one, without its last CR LF; "(closed)"
    std::string ask(const std::string& line);   // CR LF is added
    void wait_for_close();
    void reset();   // closes without a FIN
    void run_until(const std::function<bool()>& done);

    void handle_connect() override {}
    bool writable() override { return !connected || !unsent_.empty(); }
    void handle_read() override;
    void handle_write() override;
    void handle_close() override;
    void handle_error() override { handle_close(); }

    // MAIL, the RCPTs, DATA, the message, as far as the answers allow it, which are joined by " / ". After the
    // recipients DATA is said when one of them got 250.
    std::string mail(const std::string& from, const std::vector<std::string>& to, const std::string& message);

  private:
    bool whole_answer(std::size_t& size) const;

    bool use_poll_;
    std::string unsent_;
};

}   // namespace support

#endif
