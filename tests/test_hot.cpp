// The short passes of loop(): a few busy objects among many that are idle, and nobody is forgotten. The bounds are in
// passes over the busy ones, so that they hold on any machine: here a full pass asks fifty times as many objects as a
// short one, so ten times its cost is some hundred short passes.

#include "dialog.hpp"
#include "test.hpp"

using asyncore::dispatcher;
using asyncore::map_type;
using asyncore::socket_type;
using support::wire;

namespace {

constexpr int bound = 2000;         // short passes within which a full one comes
constexpr int at_once = 3;          // passes, when it need not wait for a full one
constexpr int warm = 300;           // passes after which the busy ones are hot
constexpr int enough = 5 * bound;   // passes after which a test gives up

std::unique_ptr<socket_type> another(const wire& it) { return std::make_unique<socket_type>(::dup(it.fd())); }

// Counts the questions; does nothing else until it is told.
struct object : dispatcher {
    int asked = 0, reads = 0, timeouts = 0;
    asyncore::clock::time_point due = asyncore::clock::time_point::max();
    std::function<void()> on_read;
    using dispatcher::dispatcher;
    bool readable() override { return ++asked; }
    bool writable() override { return false; }
    asyncore::clock::time_point deadline() override { return due; }
    void handle_read() override {
        ++reads;
        if (on_read) on_read();
    }
    void handle_timeout() override {
        ++timeouts;
        due = asyncore::clock::time_point::max();
    }
    void handle_error() override { throw; }
};

// Objects that always have something to read, and many that never have. Each is one descriptor, so that select() can
// have a thousand of them.
struct crowd {
    map_type map;
    bool use_poll;
    std::pair<wire, std::unique_ptr<socket_type>> loud = wire::pair(), silent = wire::pair();
    wire loud_end{std::move(*loud.second)}, silent_end{std::move(*silent.second)};
    std::vector<std::unique_ptr<object>> busy, idle;
    int passes = 0;   // that the first of the busy ones has seen
    std::function<void()> on_pass;

    explicit crowd(bool with_poll, int many = 940, int few = 20) : use_poll(with_poll) {
        loud.first.send("x");
        for (int i = 0; i < many; ++i) idle.push_back(std::make_unique<object>(another(silent_end), &map));
        for (int i = 0; i < few; ++i) busy.push_back(std::make_unique<object>(another(loud_end), &map));
        busy[0]->on_read = [this] {
            ++passes;
            if (on_pass) on_pass();
            if (passes > enough) throw asyncore::ExitNow("it was forgotten");
        };
    }

    void loop() {
        try {
            asyncore::loop(30.0, use_poll, &map);
        } catch (const asyncore::ExitNow& why) {
            if (std::string(why.what()) != "done") throw;
        }
    }

    // Runs the loop until the busy ones are hot, then begin(), in a short pass, then until done(); the passes that
    // took.
    int passes_until(const std::function<void()>& begin, const std::function<bool()>& done) {
        on_pass = [&, begun = false, asked = 0]() mutable {
            if (begun) {
                if (done()) throw asyncore::ExitNow("done");
                return;
            }
            const bool short_pass = std::exchange(asked, idle[0]->asked) == idle[0]->asked;
            if (passes < warm || (!short_pass && passes < 2 * warm)) return;
            begun = true;
            passes = 0;
            begin();
        };
        loop();
        return passes;
    }
};

[[noreturn]] void done() { throw asyncore::ExitNow("done"); }

}   // namespace

TEST(hot, a_few_of_many_are_asked_more_often) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        all.on_pass = [&] {
            if (all.passes == bound) done();
        };
        all.loop();
        CHECK(all.idle[0]->asked < bound / 3);
        CHECK(all.idle[0]->asked > 1);
        CHECK_EQ(all.busy[0]->asked, bound);
        for (const auto& it : all.busy) CHECK(it->reads >= bound - 1);   // no one is left behind
    }
}

TEST(hot, everyone_of_a_small_map_is_asked_each_time) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll, 28, 3);
        all.on_pass = [&] {
            if (all.passes == bound) done();
        };
        all.loop();
        CHECK_EQ(all.idle[0]->asked, bound);
    }
}

TEST(hot, everyone_is_asked_each_time_when_many_are_busy) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll, 100, 50);
        all.on_pass = [&] {
            if (all.passes == bound) done();
        };
        all.loop();
        CHECK_EQ(all.idle[0]->asked, bound);
    }
}

TEST(hot, an_idle_one_that_wakes) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        auto [end, theirs] = wire::pair();
        object sleeper(std::move(theirs), &all.map);
        const int passes = all.passes_until([&, &peer = end] { peer.send("x"); }, [&] { return sleeper.reads > 0; });
        CHECK(passes < bound);
        // It is hot from now on.
        const int seen = all.passes;
        const int reads = sleeper.reads;
        all.on_pass = [&] {
            if (all.passes == seen + warm) done();
        };
        all.loop();
        CHECK(sleeper.reads >= reads + warm - 1);
    }
}

TEST(hot, a_new_client) {
    struct server : object {
        std::unique_ptr<object> client;
        using object::object;
        void handle_accepted(std::unique_ptr<socket_type> sock, const asyncore::address&) override {
            client = std::make_unique<object>(std::move(sock), _map);
        }
    };
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        server listener(nullptr, &all.map);
        listener.create_socket();
        listener.bind({"127.0.0.1", 0});
        listener.listen(5);
        std::optional<wire> client;
        const int passes = all.passes_until(
            [&] {
                client.emplace(wire::tcp("127.0.0.1", listener.socket->getsockname().port));
                client->send("x");
            },
            [&] { return listener.client && listener.client->reads > 0; });
        CHECK(passes <= at_once);
    }
}

TEST(hot, a_deadline) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        object& it = *all.idle[7];
        int late = 0;
        it.due = asyncore::clock::now() + std::chrono::milliseconds(300);
        all.on_pass = [&] {
            all.passes = 0;   // only time counts
            if (it.timeouts > 0) done();
            if (asyncore::clock::now() > it.due) ++late;
        };
        all.loop();
        CHECK(late <= at_once);
        CHECK_EQ(it.timeouts, 1);
    }
}

TEST(hot, a_deadline_that_has_come_nearer) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        object& it = *all.idle[7];
        const int passes = all.passes_until([&] { it.due = asyncore::clock::now(); }, [&] { return it.timeouts > 0; });
        CHECK(passes < bound);
    }
}

// A hot one's deadline comes in the short passes themselves.
TEST(hot, a_deadline_of_a_hot_one) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        object& it = *all.busy[7];
        const int passes = all.passes_until([&] { it.due = asyncore::clock::now(); }, [&] { return it.timeouts > 0; });
        CHECK(passes <= at_once);
    }
}

// More than the system takes at once, to a session that was idle. Once it is seen, its rest goes out as its peer reads,
// pass by pass.
TEST(hot, output_from_elsewhere) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        auto [peer, theirs] = wire::pair();
        asynchat::async_chat chat(std::move(theirs), &all.map);
        const std::string text(4 << 20, 'x');
        std::size_t got = 0;
        const int passes = all.passes_until([&] { chat.push(text); },
                                            [&, &end = peer] {
                                                end.receive();
                                                got += std::exchange(end.received, {}).size();
                                                return got == text.size();
                                            });
        CHECK(passes < bound);
    }
}

TEST(hot, one_that_another_has_closed) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        int reads = 0;
        std::unique_ptr<object> heir;
        object& victim = *all.busy[9];
        const int fd = victim._fileno;
        auto [end, theirs] = wire::pair();
        const int passes = all.passes_until(
            [&, &peer = end, &other = theirs] {
                reads = victim.reads;
                victim.close();
                heir = std::make_unique<object>(std::move(other), &all.map);
                peer.send("x");
            },
            [&] { return heir->reads > 0; });
        CHECK(passes <= at_once);
        CHECK(victim.reads == reads);
        CHECK(all.map.get(fd) == nullptr || all.map.get(fd) == heir.get());
    }
}

// What closes in a short pass is destroyed when that ends.
TEST(hot, an_owned_one_that_closes) {
    struct mortal : object {
        bool* gone;
        mortal(std::unique_ptr<socket_type> sock, map_type* m, bool* g) : object(std::move(sock), m), gone(g) {}
        ~mortal() override { *gone = true; }
        void handle_read() override { close(); }
    };
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        bool gone = false;
        const int passes =
            all.passes_until([&] { all.map.own(std::make_unique<mortal>(another(all.loud_end), &all.map, &gone)); },
                             [&] { return gone; });
        CHECK(passes <= at_once);
    }
}

TEST(hot, the_passes_that_a_caller_counts_are_full_ones) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        asyncore::loop(30.0, use_poll, &all.map, 50);
        CHECK_EQ(all.idle[0]->asked, 50);
        CHECK_EQ(all.busy[0]->reads, 50);
        for (int i = 0; i < 50; ++i) use_poll ? asyncore::poll2(0.0, &all.map) : asyncore::poll(0.0, &all.map);
        CHECK_EQ(all.idle[0]->asked, 100);
        CHECK_EQ(all.passes, 100);
    }
}

// From within a short pass, which goes on afterwards.
TEST(hot, nested_passes) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        auto [end, theirs] = wire::pair();
        object sleeper(std::move(theirs), &all.map);
        int asked = 0, first_reads = 0;
        bool inside = false;
        all.passes_until(
            [&, &peer = end] {
                asked = all.idle[0]->asked;
                asyncore::loop(30.0, use_poll, &all.map, 2);
                use_poll ? asyncore::poll2(0.0, &all.map) : asyncore::poll(0.0, &all.map);
                asked = all.idle[0]->asked - asked;
                peer.send("x");
                asyncore::loop(30.0, use_poll, &all.map, 1);
                first_reads = sleeper.reads;
                inside = true;
                all.loop();   // left by the exception that done() makes
                inside = false;
                peer.send("x");
                sleeper.reads = all.passes = 0;
            },
            [&] { return sleeper.reads > warm; });
        CHECK_EQ(asked, 3);
        CHECK_EQ(first_reads, 1);
        CHECK(!inside);
        CHECK(all.passes <= warm + bound);
    }
}

TEST(hot, ExitNow_and_on_again) {
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        for (int round = 0; round < 10; ++round) {
            all.passes = 0;
            all.passes_until([] { done(); }, [] { return false; });
            CHECK_EQ(all.passes, 0);   // none after it
        }
    }
}

// The short passes end when nothing comes: the loop waits as ever, here for a deadline.
TEST(hot, all_fall_silent) {
    struct alarm : object {
        using object::object;
        void handle_timeout() override { done(); }
    };
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        alarm clock(another(all.silent_end), &all.map);
        int asked = 0;
        all.passes_until(
            [&] {
                all.loud_end.receive();   // the byte that all of them saw
                asked = all.busy[5]->asked;
                clock.due = asyncore::clock::now() + std::chrono::milliseconds(200);
            },
            [] { return false; });
        CHECK(asyncore::clock::now() >= clock.due);
        CHECK(all.busy[5]->asked - asked <= at_once);
    }
}

// It happens to have nothing to read when a full pass asks it, and stays hot all the same.
TEST(hot, one_that_misses_a_full_pass) {
    struct shy : object {
        const object* other = nullptr;
        int seen = 0;
        using object::object;
        bool readable() override { return !other || std::exchange(seen, other->asked) == other->asked; }
    };
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        shy it(another(all.loud_end), &all.map);
        all.on_pass = [&] {
            if (all.passes == warm) it.other = all.idle[0].get();   // a lower descriptor: asked before
            if (all.passes == bound) done();
        };
        all.loop();
        CHECK(it.reads > warm + bound / 2);
    }
}

// Timeouts are events too: here the only ones.
TEST(hot, one_that_is_always_due) {
    struct ticker : object {
        using object::object;
        asyncore::clock::time_point deadline() override { return asyncore::at_once; }
        void handle_timeout() override {
            if (++timeouts == bound) done();
        }
    };
    for (const bool use_poll : {false, true}) {
        crowd all(use_poll);
        all.loud_end.receive();
        ticker it(another(all.silent_end), &all.map);
        all.loop();
        CHECK(all.idle[0]->asked < bound / 3);
    }
}
