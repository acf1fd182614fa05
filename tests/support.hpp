// What all tests share: a server that records, and passes until something has happened. See dialog.hpp for clients.

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

// Runs passes until done() or, with a failure, for thirty seconds; for one, when that has happened before.
void run_until(asyncore::map_type& map, const std::function<bool()>& done, bool use_poll = false);

}   // namespace support

#endif
