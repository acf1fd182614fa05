// The seams for those who build on it: another thread, another socket, another session, a reply that comes later.

#include <atomic>
#include <iostream>
#include <thread>

#include "dialog.hpp"
#include "scene.hpp"

using asyncore::map_type;
using scenes::scene_with;
using smtpd::deferred_reply;
using smtpd::message_options;
using smtpd::SMTPChannel;
using support::captured;
using support::dialog;
using support::hooked;
using support::run_until;
using support::session;
using support::upstream;
using support::wire;
using namespace std::chrono_literals;

namespace {

// A server whose channels are of the test's own class.
template <typename Channel>
struct serving : hooked {
    Channel* made = nullptr;
    using hooked::hooked;
    std::unique_ptr<SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                               const asyncore::address& from) override {
        auto channel = std::make_unique<Channel>(*this, std::move(conn), from);
        made = channel.get();
        return channel;
    }
};

}   // namespace

// ---------------------------------------------------------------------------------------------------------
// trigger
// ---------------------------------------------------------------------------------------------------------

TEST(seams, a_worker_answers_a_thousand_replies_and_stops_the_loop) {
    constexpr int count = 1000;
    map_type map;
    hooked server(map);
    asyncore::trigger trigger(&map);
    std::mutex lock;
    std::deque<deferred_reply> work;
    std::atomic<bool> over{false};
    server.hook = [&](const message_options& kwargs) {
        const std::lock_guard<std::mutex> guard(lock);
        work.push_back(kwargs.defer());
        return std::nullopt;
    };
    std::thread worker([&] {
        for (int done = 0; done < count && !over;) {
            std::unique_lock<std::mutex> guard(lock);
            if (work.empty()) {
                guard.unlock();
                std::this_thread::yield();
                continue;
            }
            // The token belongs to the loop: it goes there in the thunk.
            trigger.pull_trigger(
                [reply = std::move(work.front()), done] { reply.answer("250 " + std::to_string(done)); });
            work.pop_front();
            ++done;
        }
        trigger.pull_trigger([&] { trigger.close(), server.close(); });
    });
    wire client = wire::to(server);
    std::string all = "HELO a\r\n", expected;
    for (int i = 0; i < count; ++i) {
        all += "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\n";
        expected = "250 " + std::to_string(i) + "\r\n";
    }
    all += "QUIT\r\n";
    std::string_view rest = all;
    const auto start = asyncore::clock::now();
    try {
        while (!map.empty()) {
            rest.remove_prefix(client.send_some(rest));
            client.receive_all();
            asyncore::poll(rest.empty() ? 30.0 : 0.0, &map);
            if (asyncore::clock::now() - start > 60s) throw std::runtime_error("it hangs");
        }
    } catch (...) {
        over = true;
        worker.join();
        throw;
    }
    worker.join();
    client.receive_all();
    CHECK(client.received.find(expected + "221 Bye\r\n") != std::string::npos);
    CHECK_EQ(server.messages.size(), static_cast<std::size_t>(count));
}

TEST(seams, thunks_run_in_order_and_none_is_lost) {
    map_type map;
    asyncore::trigger trigger(&map);
    std::vector<int> order;
    captured out(std::cout);
    trigger.pull_trigger([&] { order.push_back(1); });
    trigger.pull_trigger([&] {
        order.push_back(2);
        trigger.pull_trigger([&] { order.push_back(6); });
        throw std::runtime_error("the second");
    });
    trigger.pull_trigger();   // wakes, and does nothing
    trigger.pull_trigger([&] { order.push_back(3), throw asyncore::ExitNow(); });
    trigger.pull_trigger([&] { order.push_back(4); });
    for (int i = 0; i < 100000; ++i) trigger.pull_trigger();   // a full pipe is no error
    CHECK_THROWS(asyncore::poll(5.0, &map), asyncore::ExitNow);
    CHECK(out.text().find("in a thunk of <asyncore.trigger connected") != std::string::npos);
    CHECK(out.text().find("the second") != std::string::npos);
    for (int i = 0; i < 200; ++i) asyncore::poll(0.0, &map);
    CHECK((order == std::vector<int>{1, 2, 3, 4, 6}));
    CHECK_EQ(map.size(), 1u);
}

// A thread may not know that the loop has ended.
TEST(seams, a_trigger_that_is_closed) {
    map_type map;
    asyncore::trigger trigger(&map);
    int calls = 0;
    trigger.pull_trigger([&] { ++calls, trigger.close(); });
    trigger.pull_trigger([&] { ++calls; });
    asyncore::loop(1e12, false, &map);
    trigger.pull_trigger([&] { ++calls; });
    CHECK_EQ(calls, 1);
    CHECK(map.empty());
}

TEST(seams, a_trigger_wakes_a_loop_that_waits_for_ever) {
    map_type map;
    asyncore::trigger trigger(&map);
    std::thread worker([&] { trigger.pull_trigger([&] { trigger.close(); }); });
    asyncore::loop(1e12, false, &map);
    worker.join();
    CHECK(map.empty());
}

// ---------------------------------------------------------------------------------------------------------
// Replies that come later
// ---------------------------------------------------------------------------------------------------------

TEST(seams, a_message_leads_to_its_channel) {
    session it;
    message_options kept;
    SMTPChannel* seen = nullptr;
    it.server.hook = [&](const message_options& kwargs) {
        kept = kwargs;
        seen = kwargs.channel();
        return std::nullopt;
    };
    it.helo_to_data();
    it.line("x\r\n.", "250 OK");
    CHECK(seen == &it.channel());
    CHECK(kept.channel() == nullptr);
    deferred_reply owed;
    it.server.hook = [&](const message_options& kwargs) {
        kept = kwargs;
        owed = kwargs.channel()->defer();   // the same token
        kwargs.defer();
        return std::optional<std::string>("550 ignored");
    };
    it.mail_to_data();
    it.line("x\r\n.", "");
    CHECK(kept.channel() == &it.channel());
    owed.answer("250 later");
    it.client.hear("250 later\r\n");
    CHECK(kept.channel() == nullptr);
    CHECK(message_options().channel() == nullptr);
}

TEST(seams, MAIL_and_RCPT_are_answered_later) {
    struct asking : SMTPChannel {
        deferred_reply owed;
        bool at_once = false;
        using SMTPChannel::SMTPChannel;
        std::string ask() {
            owed = defer();
            if (at_once) owed.answer();
            return "550 this is ignored";
        }
        std::string refuse_MAIL(const std::string&) override { return ask(); }
        std::string refuse_RCPT(const std::string&) override { return ask(); }
    };
    map_type map;
    serving<asking> server(map);
    dialog client(map, wire::to(server));
    asking& it = *server.made;
    client.hear("220 mx.test " + std::string(smtpd::version) + "\r\n");
    client.line("HELO a", "250 mx.test");
    const auto answered = [&](const std::string& line, const std::string& with, const std::string& heard) {
        client.line(line, "");
        CHECK(it.paused());
        it.owed.answer(with);
        client.hear(heard + "\r\n");
    };
    answered("MAIL FROM:<a@b>", "550 not you", "550 not you");
    client.line("RCPT TO:<c@d>", "503 Error: need MAIL command");
    {
        captured out(std::cout);
        answered("MAIL FROM:<a@b>", "no reply", "451 Error: message not processed");
    }
    answered("MAIL FROM:<a@b>", "", "250 OK");
    CHECK_EQ(it.mailfrom, "a@b");
    answered("RCPT TO:<c@d>", "450 later", "450 later");
    client.line("DATA", "503 Error: need RCPT command");
    answered("RCPT TO:<e@f>", "250 fine", "250 OK");
    client.line("RCPT TO:<g@h>", "");
    it.owed = {};   // dropped
    client.hear("451 Error: message not processed\r\n");
    it.at_once = true;
    client.line("RCPT TO:<i@j>", "250 OK");
    CHECK((it.rcpttos == std::vector<std::string>{"e@f", "i@j"}));
    client.line("DATA", "354 End data with <CR><LF>.<CR><LF>");
    client.line("x\r\n.", "250 OK");
    CHECK_EQ(server.messages.size(), 1u);
}

// ---------------------------------------------------------------------------------------------------------
// Sockets and sessions of one's own
// ---------------------------------------------------------------------------------------------------------

namespace {

// Keeps what it reads ahead, as TLS does.
struct reading_ahead : asyncore::socket_type {
    std::string ahead;
    using socket_type::socket_type;
    std::size_t recv(char* buffer, std::size_t size, int flags = 0) override {
        if (ahead.empty()) {
            char all[1000];
            ahead.assign(all, socket_type::recv(all, sizeof all, flags));
        }
        const std::size_t taken = ahead.copy(buffer, std::min<std::size_t>(size, 3));
        ahead.erase(0, taken);
        return taken;
    }
    bool pending() const override { return !ahead.empty(); }
};

}   // namespace

TEST(seams, input_that_select_cannot_see) {
    for (const bool use_poll : {false, true}) {
        map_type map;
        hooked server(map);
        auto [end, sock] = wire::pair();
        auto own = std::make_unique<reading_ahead>(::dup(sock->fileno()));
        sock.reset();
        server.handle_accepted(std::move(own), asyncore::address::unix_path(""));
        support::wait_for(map, end, "\r\n", use_poll);
        end.send("HELO a\r\nNOOP\r\n");
        CHECK_EQ(support::wait_for(map, end, "OK\r\n", use_poll), "250 mx.test\r\n250 OK\r\n");
    }
}

TEST(seams, create_socket_takes_the_socket_of_a_subclass) {
    struct own : asyncore::dispatcher {
        using dispatcher::dispatcher;
        std::unique_ptr<asyncore::socket_type> make_socket(int family, int type) override {
            const asyncore::socket_type plain(family, type);
            return std::make_unique<reading_ahead>(::dup(plain.fileno()));
        }
    };
    map_type map;
    own it(nullptr, &map);
    it.create_socket();
    CHECK(dynamic_cast<reading_ahead*>(it.socket.get()) != nullptr);
}

// STARTTLS: what the client has sent ahead of the handshake is dropped, what it was told has gone out.
TEST(seams, a_new_socket_in_the_middle) {
    struct changing : SMTPChannel {
        std::unique_ptr<asyncore::socket_type> next;
        using SMTPChannel::SMTPChannel;
        command find_command(std::string_view verb) override {
            return verb == "STARTTLS" ? static_cast<command>(&changing::smtp_STARTTLS)
                                      : SMTPChannel::find_command(verb);
        }
        void smtp_STARTTLS(argument) {
            push("220 go ahead");
            discard_input();
            set_socket(std::move(next));
            push("250 over here");
        }
    };
    map_type map;
    serving<changing> server(map);
    wire client = wire::to(server);
    auto [other, sock] = wire::pair();
    server.made->next = std::move(sock);
    client.take();
    client.send("STARTTLS\r\nNOOP\r\nNOOP\r\n");
    for (int i = 0; i < 3; ++i) asyncore::poll(0.0, &map);
    CHECK_EQ(client.take(), "220 go ahead\r\n");
    CHECK_EQ(other.take(), "250 over here\r\n");
    other.send("NOOP\r\n");
    CHECK_EQ(support::wait_for(map, other, "\r\n"), "250 OK\r\n");
}

TEST(seams, the_sessions_of_a_proxy) {
    struct own_session : smtpd::SMTP {
        using SMTP::SMTP;
        void ehlo_or_helo_if_needed(handler then) override { fail("no TLS, no mail"), then({-1, "no TLS, no mail"}); }
    };
    struct own_proxy : smtpd::PureProxy {
        bool strict = false;
        using PureProxy::PureProxy;
        std::unique_ptr<smtpd::SMTP> make_session(side to) const override {
            return strict ? std::make_unique<own_session>(settings.map) : PureProxy::make_session(to);
        }
    };
    scene_with<own_proxy> here;
    here.server.strict = true;
    CHECK_EQ(here.client.ask("MAIL FROM:<a@b>"), scenes::NOT_AVAILABLE);
    here.server.strict = false;
    CHECK_EQ(here.client.mail("<a@b>", {"c@d"}, "Hello\r\n"), scenes::RELAYED);
}

TEST(seams, the_log_can_go_to_a_function) {
    std::vector<std::string> told;
    asyncore::log_handler = [&](std::string_view message, std::string_view type) {
        told.push_back(std::string(type) + ": " + std::string(message));
    };
    captured out(std::cout);
    asyncore::dispatcher it;
    it.log_info("once");
    asyncore::log_handler = nullptr;
    it.log_info("twice");
    CHECK_EQ(support::list(told), "['info: once']");
    CHECK_EQ(out.text(), "info: twice\n");
}

// ---------------------------------------------------------------------------------------------------------
// sendmail()
// ---------------------------------------------------------------------------------------------------------

TEST(seams, sendmail_tells_what_failed) {
    scenes::upstream_thread there([](upstream& up) {
        up.always["RCPT TO:<no@example>"] = support::says("550 5.1.1 nobody");
        up.always["RCPT TO:<later@example>"] = support::says("450 4.2.0 later");
    });
    smtpd::sendmail_options with;
    with.mail_options = {"BODY=8BITMIME"};
    with.local_hostname = "mailer.test";
    try {
        smtpd::sendmail(there.up.where(), "a@b", {"no@example", "later@example"}, "x", {}, with);
        CHECK(false);
    } catch (const smtpd::SMTPResponseException& error) {
        CHECK_EQ(error.stage, "RCPT");
        CHECK_EQ(error.answer.code, 450);
        CHECK_EQ(error.recipients.size(), 2u);
        CHECK_EQ(error.recipients.at("no@example").text, "5.1.1 nobody");
    }
    there.join();
    CHECK_EQ(there.up.heard.at(0).at(0), "EHLO mailer.test");
    CHECK(there.up.heard.at(0).at(1).find(" BODY=8BITMIME") != std::string::npos);
}

TEST(seams, sendmail_has_a_total_limit) {
    scenes::upstream_thread there([](upstream& up) { up.always["RCPT"] = support::says_nothing(); });
    smtpd::sendmail_options with;
    with.total = 100ms;
    const auto start = asyncore::clock::now();
    try {
        smtpd::sendmail(there.up.where(), "a@b", {"c@d"}, "x", {}, with);
        CHECK(false);
    } catch (const smtpd::SMTPResponseException& error) {
        CHECK_EQ(error.stage, "RCPT");
        CHECK_EQ(error.answer.text, "no answer in time");
    }
    CHECK(asyncore::clock::now() - start < 10s);
    const auto all = smtpd::timeouts::all(7ms);
    CHECK(all.connect == 7ms && all.data_termination == 7ms && all.quit == 7ms);
}
