#include "support.hpp"

namespace support {

recorder::recorder(asyncore::map_type& map, smtpd::options with)
    : SMTPServer({"127.0.0.1", 0}, {}, [&] {
          with.map = &map;
          if (with.fqdn.empty()) with.fqdn = "mx.test";
          return with;
      }()) {}

std::optional<std::string> recorder::process_message(const asyncore::address& peer, const std::string& mailfrom,
                                                     const std::vector<std::string>& rcpttos, std::string&& data,
                                                     const smtpd::message_options& kwargs) {
    messages.push_back({peer, mailfrom, rcpttos, data, kwargs.mail_options, kwargs.rcpt_options});
    return status;
}

void run_until(asyncore::map_type& map, const std::function<bool()>& done, bool use_poll) {
    static std::chrono::seconds patience(30);   // less when something has gone wrong already
    const auto end = asyncore::clock::now() + patience;
    while (!done()) {
        if (asyncore::clock::now() > end) {
            const auto waited = std::exchange(patience, std::chrono::seconds(1));
            throw std::runtime_error("nothing happened for " + std::to_string(waited.count()) + " s");
        }
        use_poll ? asyncore::poll2(0.01, &map) : asyncore::poll(0.01, &map);
    }
}

}   // namespace support
