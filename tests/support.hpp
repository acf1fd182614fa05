// What tests share: a server that records, and a client to talk to it, in one thread.

#ifndef SUPPORT_HPP
#define SUPPORT_HPP

#include <string>
#include <string_view>
#include <vector>

#include "loopback.hpp"
#include "smtpd.hpp"

namespace support {

// What a server of that name says first.
inline std::string banner(const std::string& host) {
    return "220 " + host + " " + std::string(smtpd::version) + "\r\n";
}

struct message {
    asyncore::address peer;
    std::string mailfrom;
    std::vector<std::string> rcpttos;
    std::string data;
    std::vector<std::string> mail_options, rcpt_options;
};

// Keeps the messages; answers with `status`.
class recorder : public smtpd::SMTPServer {
  public:
    std::vector<message> messages;
    std::optional<std::string> status;

    explicit recorder(asyncore::map_type& map, smtpd::options with = {});
    std::string class_name() const override { return "recorder"; }
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override;
    int port() const { return socket->getsockname().port; }
};

// The other end of a connection, non-blocking; the loop of `map` runs while it waits.
class client {
  public:
    // One end of a socketpair; the other is given to the server as an accepted connection.
    static client pair(smtpd::SMTPServer& server);
    // Connected by TCP to a listener in the same map.
    static client tcp(asyncore::map_type& map, int port, const std::string& host = "127.0.0.1");

    client(asyncore::map_type& map, asyncore::socket_type sock);

    // Sends the bytes, runs passes until nothing happens any more, and returns what has come.
    std::string say(std::string_view bytes);
    void send(std::string_view bytes);
    // Runs passes until nothing happens any more; what has come since the last call.
    std::string hear();
    // Runs passes until the text has come; what has come up to and with it. Fails after thirty seconds.
    std::string wait_for(std::string_view text);
    bool at_eof() const { return eof_; }   // the server has closed
    void shutdown_write();
    void close() { sock_.close(); }
    int fd() const { return sock_.fileno(); }

  private:
    bool receive();

    asyncore::map_type* map_;
    asyncore::socket_type sock_;
    std::string received_;
    bool eof_ = false;
};

// Runs passes until done() or, with a failure, for thirty seconds; for one, when that has happened before.
void run_until(asyncore::map_type& map, const std::function<bool()>& done, bool use_poll = false);

}   // namespace support

#endif
