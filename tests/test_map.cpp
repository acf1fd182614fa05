// Ownership: one map, one rule.

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <tuple>

#include "dialog.hpp"
#include "test.hpp"

namespace {

std::pair<int, int> socket_pair() {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) throw std::runtime_error("socketpair");
    return {fds[0], fds[1]};
}

// A dispatcher whose read event is a function.
class probe : public asyncore::dispatcher {
  public:
    probe(asyncore::map_type& map, int fd, std::function<void(probe&)> on_read, int* destroyed = nullptr)
        : dispatcher(std::make_unique<asyncore::socket_type>(fd), &map),
          on_read_(std::move(on_read)),
          destroyed_(destroyed) {}
    ~probe() override {
        if (destroyed_) ++*destroyed_;
    }
    bool writable() override { return false; }
    void handle_read() override { on_read_(*this); }

  private:
    std::function<void(probe&)> on_read_;
    int* destroyed_;
};

}   // namespace

TEST(map, a_dispatcher_registers_itself_and_leaves) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    {
        probe it(map, a, [](probe&) {});
        CHECK_EQ(map.size(), 1u);
        CHECK(map.get(a) == &it);
    }
    CHECK(map.empty());
    ::close(b);
}

TEST(map, an_owned_object_that_closes_itself_goes_on_running) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    int destroyed = 0;
    bool alive_after_close = false;
    map.own(std::make_unique<probe>(
        map, a,
        [&](probe& self) {
            self.close();
            alive_after_close = destroyed == 0;
        },
        &destroyed));
    CHECK_EQ(::write(b, "x", 1), 1);
    asyncore::poll(1.0, &map);
    CHECK(alive_after_close);
    CHECK_EQ(destroyed, 1);
    CHECK(map.empty());
    ::close(b);
}

TEST(map, nested_passes_destroy_when_the_outermost_ends) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    int c = -1, d = -1;
    std::tie(c, d) = socket_pair();
    int destroyed = 0, seen_inside = -1;
    map.own(std::make_unique<probe>(
        map, c, [](probe& self) { self.close(); }, &destroyed));
    probe outer(map, a, [&](probe& self) {
        self.recv(1);
        CHECK_EQ(::write(d, "x", 1), 1);
        asyncore::poll(1.0, &map);
        seen_inside = destroyed;
    });
    CHECK_EQ(::write(b, "x", 1), 1);
    asyncore::poll(1.0, &map);
    CHECK_EQ(seen_inside, 0);
    CHECK_EQ(destroyed, 1);
    ::close(b);
    ::close(d);
}

// Deviation 22
TEST(map, an_event_does_not_reach_a_newcomer_on_the_same_descriptor) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    const auto [c, d] = socket_pair();
    int stale = 0;
    std::unique_ptr<probe> newcomer;
    int spare[2] = {-1, -1};
    // Both have input; the first one closes the second and opens a third, which gets its descriptor.
    auto second = std::make_unique<probe>(map, std::max(a, c), [](probe&) {});
    const int reused = second->_fileno;
    probe first(map, std::min(a, c), [&](probe& self) {
        self.recv(1);
        second.reset();
        CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, spare), 0);
        CHECK_EQ(spare[0], reused);
        newcomer = std::make_unique<probe>(map, spare[0], [&](probe&) { ++stale; });
    });
    CHECK_EQ(::write(b, "x", 1), 1);
    CHECK_EQ(::write(d, "x", 1), 1);
    asyncore::poll(1.0, &map);
    CHECK(newcomer != nullptr);
    CHECK_EQ(stale, 0);
    newcomer.reset();
    ::close(spare[1]);
    ::close(b);
    ::close(d);
}

TEST(map, the_end_of_a_map_destroys_what_it_owns) {
    int destroyed = 0;
    const auto [a, b] = socket_pair();
    {
        asyncore::map_type map;
        map.own(std::make_unique<probe>(
            map, a, [](probe&) {}, &destroyed));
        CHECK_EQ(destroyed, 0);
    }
    CHECK_EQ(destroyed, 1);
    ::close(b);
}

TEST(map, a_server_closes_its_channels_when_it_ends) {
    asyncore::map_type map;
    {
        support::recorder server(map);
        auto client = support::wire::to(server);
        CHECK_EQ(client.take().substr(0, 4), std::string("220 "));
        CHECK_EQ(map.size(), 2u);
    }
    CHECK(map.empty());
}

TEST(map, a_deadline_bounds_the_wait) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    struct timed : probe {
        using probe::probe;
        asyncore::clock::time_point due = asyncore::clock::now() + std::chrono::milliseconds(20);
        bool fired = false;
        asyncore::clock::time_point deadline() override { return fired ? asyncore::clock::time_point::max() : due; }
        void handle_timeout() override { fired = true; }
    } it(map, a, [](probe&) {});
    asyncore::poll(30.0, &map);
    CHECK(it.fired);
    it.fired = false;
    asyncore::poll2(30.0, &map);
    CHECK(it.fired);
    ::close(b);
}

TEST(map, its_values_stand_in_the_order_of_descriptors) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    probe later(map, std::max(a, b), [](probe&) {}), earlier(map, std::min(a, b), [](probe&) {});
    const auto all = map.values();
    CHECK_EQ(all.size(), 2u);
    CHECK(all[0] == &earlier);
    CHECK(all[1] == &later);
    CHECK(map.get(-1) == nullptr);
}

TEST(map, what_it_does_not_take) {
    asyncore::map_type map, other;
    const auto [a, b] = socket_pair();
    CHECK_THROWS(other.own(std::make_unique<probe>(map, a, [](probe&) {})), std::invalid_argument);
    CHECK(map.empty());   // it has gone
    CHECK(other.empty());
    asyncore::dispatcher closed(nullptr, &map);
    CHECK_THROWS(closed.add_channel(), std::invalid_argument);
    ::close(b);
}

// What clear() has left behind is not found again, when a lower descriptor comes back.
TEST(map, it_knows_no_descriptor_beyond_its_own) {
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    const int low = ::fcntl(a, F_DUPFD, 200), next = ::fcntl(b, F_DUPFD, low + 1);
    {
        probe one(map, low, [](probe&) {}), two(map, next, [](probe&) {});
        CHECK(map.get(next) == &two);
        map.clear();
    }
    probe again(map, ::dup2(a, low), [](probe&) {});
    CHECK(map.get(low) == &again);
    for (int fd = low + 1; fd < low + 100; ++fd) CHECK(map.get(fd) == nullptr);
    ::close(a);
    ::close(b);
}

TEST(map, an_object_moves_to_another_one) {
    asyncore::map_type map, other;
    const auto [a, b] = socket_pair();
    int reads = 0;
    probe it(map, a, [&](probe& self) {
        self.recv(1);
        ++reads;
    });
    it.del_channel();
    CHECK(map.empty());
    it._fileno = a;   // which del_channel() forgets, as in Python
    it.add_channel(&other);
    it.add_channel(&other);   // is no second one
    CHECK_EQ(other.size(), 1u);
    CHECK_EQ(::write(b, "x", 1), 1);
    asyncore::poll(1.0, &other);
    CHECK_EQ(reads, 1);
    it.del_channel(&other);
    CHECK(other.empty());
    ::close(b);
}

TEST(map, a_handler_may_clear_it) {
    for (const bool use_poll : {false, true}) {
        asyncore::map_type map;
        const auto [a, b] = socket_pair();
        const auto [c, d] = socket_pair();
        int reads = 0;
        const auto on_read = [&](probe&) {
            ++reads;
            map.clear();
        };
        probe one(map, a, on_read), two(map, c, on_read);
        CHECK_EQ(::write(b, "x", 1) + ::write(d, "x", 1), 2);
        use_poll ? asyncore::poll2(1.0, &map) : asyncore::poll(1.0, &map);
        CHECK_EQ(reads, 1);   // the other one has left before its turn
        CHECK(map.empty());
        ::close(b);
        ::close(d);
    }
}

// A question before the wait is a chance to leave as well.
TEST(map, a_question_may_clear_it) {
    struct leaver : asyncore::dispatcher {
        using dispatcher::dispatcher;
        bool readable() override {
            _map->clear();
            return true;
        }
    };
    asyncore::map_type map;
    const auto [a, b] = socket_pair();
    leaver it(std::make_unique<asyncore::socket_type>(a), &map);
    asyncore::poll(0.0, &map);
    CHECK(map.empty());
    ::close(b);
}
