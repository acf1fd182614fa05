// A proxy between an upstream that follows a script and a client, all in one loop. See upstream.hpp.

#ifndef SCENE_HPP
#define SCENE_HPP

#include <atomic>
#include <cstdio>
#include <thread>

#include "test.hpp"
#include "upstream.hpp"

namespace scenes {

// What each of these tests needs, so that `using namespace scenes` is enough.
using support::act;
using support::caller;
using support::hangs_up;
using support::resets;
using support::says;
using support::says_nothing;
using support::sends;
using support::upstream;

inline const std::string OK = "250 OK";
inline const std::string NOT_AVAILABLE = "451 Error: the next server is not available";
inline const std::string TAKEN = "250 2.0.0 message ok";                    // what the upstream says to a message
inline const std::string RELAYED = OK + " / " + OK + " / 354 / " + TAKEN;   // what caller::mail() then returns

using milliseconds = std::chrono::milliseconds;

// With a client that has said EHLO.
template <typename Server = smtpd::PureProxy>
struct scene_with {
    asyncore::map_type map;
    support::upstream up{map};
    std::unique_ptr<Server> owned;
    Server& server;
    support::caller client;
    bool use_poll;

    explicit scene_with(bool with_poll = false, smtpd::options with = {})
        : owned(std::make_unique<Server>(asyncore::address("127.0.0.1", 0), up.where(), prepared(map, with))),
          server(*owned),
          client(map, server.socket->getsockname(), with_poll),
          use_poll(with_poll) {
        CHECK_EQ(client.answer().substr(0, 4), std::string("220 "));
        CHECK_EQ(client.ask("EHLO client.test").substr(0, 4), std::string("250-"));
    }

    static smtpd::options prepared(asyncore::map_type& map, smtpd::options with) {
        with.map = &map;
        with.fqdn = "mx.test";
        return with;
    }

    void run_until(const std::function<bool()>& done) { support::run_until(map, done, use_poll); }

    // What can happen now happens.
    void settle() {
        for (int i = 0; i < 20; ++i) use_poll ? asyncore::poll2(0.0, &map) : asyncore::poll(0.0, &map);
    }

    void wait_until_held(std::size_t count = 1) {
        run_until([&] { return up.held() == count; });
    }

    void wait_until_upstream_is_left() {
        run_until([this] { return up.open() == 0; });
        up.check();
    }

    // The client leaves; the upstream is left properly.
    void finish() {
        CHECK_EQ(client.ask("QUIT"), std::string("221 Bye"));
        client.wait_for_close();
        wait_until_upstream_is_left();
    }
};
using scene = scene_with<>;

// Runs a case for each row, under select() and under poll(); tells all the rows that fail, by name.
template <typename Row, typename Case>
void each(const std::vector<Row>& rows, Case run) {
    std::string failures;
    for (const bool use_poll : {false, true}) {
        for (const auto& row : rows) {
            try {
                run(row, use_poll);
            } catch (const std::exception& error) {
                failures += "\n  " + std::string(row.name) + (use_poll ? " (poll): " : " (select): ") + error.what();
            }
        }
    }
    if (!failures.empty()) throw test::failure(failures);
}

// Runs a case in which a timeout of that length passes; again with a longer one when a busy machine was too slow
// for what should have come before it.
template <typename Case>
void with_timeout(Case run) {
    try {
        run(milliseconds(25));
    } catch (const std::exception& error) {
        std::printf("note: once more with a longer timeout, after: %s\n", error.what());
        run(milliseconds(1000));
    }
}

// An upstream in a thread of its own.
class upstream_thread {
  public:
    explicit upstream_thread(const std::function<void(support::upstream&)>& prepare = nullptr) {
        if (prepare) prepare(up);
        thread_ = std::thread([this] {
            while (!stop_ || up.open() > 0) asyncore::poll(0.01, &map_);
        });
    }
    ~upstream_thread() { join(); }

    // After its clients have left.
    void join() {
        stop_ = true;
        if (thread_.joinable()) thread_.join();
    }

  private:
    asyncore::map_type map_;

  public:
    support::upstream up{map_};

  private:
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}   // namespace scenes

#endif
