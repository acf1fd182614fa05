// MailmanProxy between a client, an upstream, and the LMTP side of a Mailman. Both follow scripts; see upstream.hpp.

#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "dialog.hpp"
#include "scene.hpp"

using namespace scenes;

namespace {

const std::string NO = "550 5.1.1 never";
const std::string NOT_NOW = "450 4.2.1 not now";
const std::string END_OF_TWO = OK + " / " + OK + " / " + OK + " / 354 / ";   // what comes before the last answer
const std::string body = "From: a@client.test\r\nDate: today\r\nSubject: tagged-1\r\n\r\nHello";

// A folder that goes with it.
class temporary_folder {
  public:
    temporary_folder() {
        std::string name = (std::filesystem::temp_directory_path() / "smtpd-lists-XXXXXX").string();
        if (!::mkdtemp(name.data())) throw std::runtime_error("mkdtemp");
        path_ = name;
    }
    ~temporary_folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    temporary_folder(const temporary_folder&) = delete;
    temporary_folder& operator=(const temporary_folder&) = delete;
    const std::filesystem::path& path() const { return path_; }

  private:
    std::filesystem::path path_;
};

struct mailman_scene : scene_with<smtpd::MailmanProxy> {
    temporary_folder lists;
    upstream mailman{map};

    explicit mailman_scene(bool with_poll = false, const smtpd::options& with = {}) : scene_with(with_poll, with) {
        mailman.lmtp = true;
        server.settings.mailman_lists = (lists.path() / "lists").string();
        server.settings.mailman_lmtp = mailman.where();
        for (const char* name : {"lists/list.example.com", "lists/my-list.example.com", "lists/my-owner.example.com",
                                 "lists/a/b.example.com", "outside.example.com", "lists/.hidden.example.com"})
            std::filesystem::create_directories(lists.path() / name);
        std::ofstream(lists.path() / "lists" / "file.example.com") << "not a folder";
    }

    std::string mail(const std::vector<std::string>& to, const std::string& message = body) {
        return client.mail("<a@client.test>", to, message);
    }
    void finish() {
        scene_with::finish();
        run_until([this] { return mailman.open() == 0; });
        mailman.check();
    }
};

// The recipients of all the messages that a side was given; a message each in parentheses.
std::string recipients(const upstream& side) {
    std::string text;
    for (const auto& message : side.messages) {
        text += "(";
        for (const auto& recipient : message.rcpttos) text += (text.back() == '(' ? "" : " ") + recipient;
        text += ")";
    }
    return text;
}

}   // namespace

// Deviations 42, 43, 44
TEST(mailman, routes) {
    struct row {
        std::string name;      // the recipient
        std::string as = {};   // what Mailman knows it as; "": it goes upstream
    };
    std::vector<row> rows{{"list@example.com", "list@example.com"},
                          {"list-admin@example.com", "list-owner@example.com"},
                          {"list-Admin@example.com", "list-owner@example.com"},
                          {"list-admin+x@example.com", "list-owner+x@example.com"},
                          {"LIST@Example.COM", "LIST@Example.COM"},
                          {"LIST-OWNER@Example.COM", "LIST-OWNER@Example.COM"},
                          {"list+tag@example.com", "list+tag@example.com"},
                          {"list-confirm+0a1b2c@example.com", "list-confirm+0a1b2c@example.com"},
                          {"list-bounces+b=example.org@example.com", "list-bounces+b=example.org@example.com"},
                          {"my-list@example.com", "my-list@example.com"},
                          {"my-list-owner@example.com", "my-list-owner@example.com"},
                          {"my-list-admin@example.com", "my-list-owner@example.com"},
                          {"my-owner-owner@example.com", "my-owner-owner@example.com"},
                          {"my-owner-request@example.com", "my-owner-request@example.com"},
                          {"my@example.com"},
                          {"my-owner@example.net"},
                          {"list@example.org"},
                          {"list@sub.example.com"},
                          {"list@com"},
                          // Mailman's folder has one name for both.
                          {"list.example@com", "list.example@com"},
                          {"list"},
                          {"list-foo@example.com"},
                          {"list-owner-owner@example.com"},
                          {"list-@example.com"},
                          {"-owner@example.com"},
                          {"+list@example.com"},
                          {"+@example.com"},
                          {"listowner@example.com"},
                          {"list--owner@example.com"},
                          {"b@example.com"},
                          {"a/b@example.com"},
                          {"../outside@example.com"},
                          {"../lists/list@example.com"},
                          {"./list@example.com"},
                          {"/list@example.com"},
                          {"list/@example.com"},
                          {".hidden@example.com"},
                          {"file@example.com"},
                          {"list.example.com"},
                          {"..@example.com"},
                          {"a@b@example.com"}};
    for (const std::string command :
         {"bounces", "confirm", "join", "leave", "owner", "request", "subscribe", "unsubscribe"})
        rows.push_back({"list-" + command + "@example.com", "list-" + command + "@example.com"});
    std::string failures;
    mailman_scene here;
    for (const auto& it : rows) {
        here.up.messages.clear();
        here.mailman.messages.clear();
        const std::string told = here.mail({it.name});
        // What is no address here is neither's.
        if (told.find("501") != told.npos || told.find("553") != told.npos) {
            here.client.ask("RSET");
            if (it.as.empty()) continue;
        }
        const std::string up = recipients(here.up), mailman = recipients(here.mailman);
        const std::string expected = it.as.empty() ? "(" + it.name + ") to upstream" : "(" + it.as + ") to Mailman";
        const std::string is =
            (up.empty() ? "" : up + " to upstream") + (mailman.empty() ? "" : mailman + " to Mailman");
        if (is != expected || told != RELAYED) failures += "\n  " + it.name + ": " + is + "; " + told;
    }
    if (!failures.empty()) throw test::failure(failures);
    here.finish();
}

TEST(mailman, a_broken_address_goes_nowhere_near_the_folder) {
    asyncore::map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    temporary_folder lists;
    with.mailman_lists = lists.path().string();
    std::filesystem::create_directories(lists.path() / "list.example.com");
    smtpd::MailmanProxy proxy({"127.0.0.1", 0}, {}, with);
    CHECK(proxy.list_exists("list", "example.com"));
    for (const std::string& name : {std::string(), std::string("."), std::string(".."), std::string("list\0", 5),
                                    std::string("x/../list"), std::string("/list")})
        CHECK(!proxy.list_exists(name, "example.com"));
    for (const std::string& domain :
         {std::string(), std::string("."), std::string("example.com/"), std::string("example.com/.."),
          std::string("example.com\0", 12), std::string(".com")})
        CHECK(!proxy.list_exists("list", domain));
    CHECK(!proxy.list_exists(std::string(5000, 'x'), "example.com"));
    proxy.close();
}

// Deviation 45
TEST(mailman, headers_are_added_to_the_copy_of_the_lists_only) {
    struct row {
        std::string name;   // the message, LF for CR LF
        bool from, date;    // what is missing
    };
    const std::vector<row> rows{{"Subject: x\n\nHello", true, true},
                                {"From: me\nSubject: x\n\nHello", false, true},
                                {"date: today\nSubject: x\n\nHello", true, false},
                                {"FROM: me\nDate: today\n\nHello", false, false},
                                {"From:\nDate:\n\nHello", false, false},
                                {"X-From: me\nResent-Date: today\n\nHello", true, true},
                                {"Subject: x\n\nFrom: me\nDate: today\n\nHello", true, true},
                                {"\nHello", true, true}};
    each(rows, [](const row& it, bool use_poll) {
        mailman_scene here(use_poll);
        std::string wire;
        for (const char c : it.name) wire += c == '\n' ? "\r\n" : std::string(1, c);
        CHECK_EQ(here.mail({"list@example.com", "b@example"}, wire), END_OF_TWO + TAKEN);
        CHECK_EQ(here.up.messages.size(), 1u);
        CHECK_EQ(here.up.messages[0].data, it.name + "\n");
        CHECK_EQ(here.mailman.messages.size(), 1u);
        std::string data = here.mailman.messages[0].data;
        CHECK(data.find("X-Peer") == data.npos);
        // Without the lines that were added it is as it was.
        const std::size_t header = (data[0] == '\n' ? 0 : data.find("\n\n"));
        const auto take = [&](const std::string& start) {
            const std::size_t at = data.substr(0, start.size()) == start ? 0 : data.find("\n" + start) + 1;
            CHECK(data.substr(at, start.size()) == start && at <= header + 1);
            const std::size_t end = data.find('\n', at);
            const std::string line = data.substr(at, end - at);
            data.erase(at, line.size() + 1);
            return line;
        };
        if (it.from) CHECK_EQ(take("From: a@client.test"), std::string("From: a@client.test"));
        if (it.date) {
            const std::string line = take("Date: ");
            CHECK_EQ(line.size(), std::string("Date: Mon, 01 Jan 2024 00:00:00 +0000").size());
            CHECK_EQ(line.substr(line.size() - 6), std::string(" +0000"));
        }
        CHECK_EQ(data, it.name + "\n");
        here.finish();
    });
}

TEST(mailman, headers_are_added_to_a_header_that_does_not_end) {
    mailman_scene here;
    CHECK_EQ(here.mail({"list@example.com"}, "Subject: x"), RELAYED);
    const std::string data = here.mailman.messages.at(0).data, start = "Subject: x\nFrom: a@client.test\nDate: ";
    CHECK_EQ(data.substr(0, start.size()), start);
    here.finish();
}

TEST(mailman, upstream_first_then_a_transaction_for_each_list) {
    for (const bool use_poll : {false, true}) {
        mailman_scene here(use_poll);
        here.up.script["end"] = {says("250 fine").when_released()};
        here.mailman.always["end"] = says("250 2.0.0 message ok").when_released();
        here.client.ask("MAIL FROM:<a@client.test>");
        for (const std::string to : {"list@example.com", "b@example", "my-list@example.com", "c@example"})
            CHECK_EQ(here.client.ask("RCPT TO:<" + to + ">"), OK);
        here.client.ask("DATA");
        here.client.say(body + "\r\n.\r\n");
        here.wait_until_held();
        here.settle();
        CHECK_EQ(recipients(here.up), std::string("(b@example c@example)"));
        CHECK_EQ(recipients(here.mailman), std::string());
        here.up.release();
        here.run_until([&] { return here.mailman.held() == 1; });
        CHECK_EQ(recipients(here.mailman), std::string("(list@example.com)"));
        here.settle();
        CHECK_EQ(here.client.received, std::string());
        here.mailman.release();
        here.run_until([&] { return here.mailman.held() == 1; });
        here.settle();
        CHECK_EQ(here.client.received, std::string());
        here.mailman.release();
        CHECK_EQ(here.client.answer(), TAKEN);
        CHECK_EQ(recipients(here.mailman), std::string("(list@example.com)(my-list@example.com)"));
        CHECK_EQ(here.up.messages.size(), 1u);
        here.mailman.always.clear();
        // The next message finds both sides clean.
        CHECK_EQ(here.mail({"list@example.com", "d@example"}), END_OF_TWO + TAKEN);
        here.finish();
    }
}

TEST(mailman, a_side_that_is_not_needed_is_not_asked) {
    mailman_scene here;
    CHECK_EQ(here.mail({"list@example.com"}), RELAYED);
    CHECK_EQ(here.up.heard.size(), 0u);
    CHECK_EQ(here.mailman.conversation(0).substr(0, 12), std::string("LHLO mx.test"));
    here.finish();
    mailman_scene other;
    CHECK_EQ(other.mail({"b@example"}), RELAYED);
    CHECK_EQ(other.mailman.heard.size(), 0u);
    CHECK_EQ(other.up.messages[0].data, std::string("From: a@client.test\nDate: today\nSubject: tagged-1\n\nHello\n"));
    other.finish();
}

TEST(mailman, failures_of_either_side_are_told) {
    struct row {
        std::string name;
        bool at_mailman;
        std::string stage;
        act what;
        std::string told;
        std::size_t up, mailman;   // messages that were taken
    };
    const std::string lost = NOT_AVAILABLE;
    const std::string of_one = OK + " / " + OK + " / " + lost + " / 354 / " + TAKEN;   // a side costs only its own
    const std::vector<row> rows{
        {"upstream's no to the message", false, "end", says(NO), END_OF_TWO + NO, 0, 0},
        {"upstream's 4xx to the message", false, "end", says(NOT_NOW), END_OF_TWO + NOT_NOW, 0, 0},
        {"upstream closes at the end", false, "end", hangs_up(), END_OF_TWO + lost, 0, 0},
        {"upstream's no to DATA", false, "DATA", says(NO), END_OF_TWO + NO, 0, 0},
        {"upstream's no to MAIL", false, "MAIL", says(NO), OK + " / " + OK + " / " + NO + " / 354 / " + TAKEN, 0, 1},
        {"upstream's no to RCPT", false, "RCPT", says(NO), OK + " / " + OK + " / " + NO + " / 354 / " + TAKEN, 0, 1},
        {"upstream's 421 to RCPT", false, "RCPT", says("421 later"), of_one, 0, 1},
        {"upstream does not greet", false, "greeting", hangs_up(), of_one, 0, 1},
        {"Mailman's no to the message", true, "end", says(NO), END_OF_TWO + NO, 1, 0},
        {"Mailman's 4xx to the message", true, "end", says(NOT_NOW), END_OF_TWO + NOT_NOW, 1, 0},
        {"Mailman closes at the end", true, "end", hangs_up(), END_OF_TWO + lost, 1, 0},
        {"Mailman resets at the end", true, "end", resets(), END_OF_TWO + lost, 1, 0},
        {"Mailman's 421 to the message", true, "end", says("421 later"), END_OF_TWO + lost, 1, 0},
        {"Mailman's no to DATA", true, "DATA", says(NO), END_OF_TWO + NO, 1, 0},
        {"Mailman's no to RCPT", true, "RCPT", says(NO), OK + " / " + NO + " / " + OK + " / 354 / " + TAKEN, 1, 0},
        {"Mailman's 4xx to MAIL", true, "MAIL", says(NOT_NOW), OK + " / " + NOT_NOW + " / " + OK + " / 354 / " + TAKEN,
         1, 0},
        {"Mailman closes at RCPT", true, "RCPT", hangs_up(), OK + " / " + lost + " / " + OK + " / 354 / " + TAKEN, 1,
         0},
        {"Mailman resets at MAIL", true, "MAIL", resets(), OK + " / " + lost + " / " + OK + " / 354 / " + TAKEN, 1, 0},
        {"Mailman's 421 to LHLO", true, "LHLO", says("421 later"), OK + " / " + lost + " / " + OK + " / 354 / " + TAKEN,
         1, 0},
        {"Mailman does not know LHLO", true, "LHLO", says("502 what?"),
         OK + " / 502 what? / " + OK + " / 354 / " + TAKEN, 1, 0}};
    each(rows, [](const row& it, bool use_poll) {
        mailman_scene here(use_poll);
        (it.at_mailman ? here.mailman : here.up).script[it.stage] = {it.what};
        CHECK_EQ(here.mail({"list@example.com", "b@example"}), it.told);
        CHECK_EQ(here.up.accepted("tagged-1"), it.up);
        CHECK_EQ(here.mailman.accepted("tagged-1"), it.mailman);
        here.client.ask("RSET");
        // The client's retry reaches both.
        CHECK_EQ(here.mail({"list@example.com", "b@example"}), END_OF_TWO + TAKEN);
        CHECK_EQ(here.up.accepted("tagged-1"), it.up + 1);
        CHECK_EQ(here.mailman.accepted("tagged-1"), it.mailman + 1);
        here.finish();
    });
}

TEST(mailman, the_first_of_two_lists_fails) {
    mailman_scene here;
    here.mailman.script["end list@example.com"] = {says(NOT_NOW)};
    CHECK_EQ(here.mail({"list@example.com", "my-list@example.com"}), END_OF_TWO + NOT_NOW);
    CHECK_EQ(here.mailman.accepted("tagged-1"), 0u);
    here.mailman.script["end my-list@example.com"] = {says(NO)};
    CHECK_EQ(here.mail({"list@example.com", "my-list@example.com"}), END_OF_TWO + NO);
    CHECK_EQ(here.mailman.accepted("tagged-1"), 1u);
    here.finish();
}

TEST(mailman, a_stopped_Mailman_is_451) {
    for (const bool use_poll : {false, true}) {
        mailman_scene here(use_poll);
        here.mailman.refuse();
        CHECK_EQ(here.mail({"list@example.com"}), OK + " / " + NOT_AVAILABLE);
        CHECK_EQ(here.client.ask("RSET"), OK);
        CHECK_EQ(here.mail({"b@example"}), RELAYED);
        here.mailman.accept_again();
        CHECK_EQ(here.mail({"list@example.com"}), RELAYED);
        here.finish();
    }
}

// A side that is down costs only its own recipients; those that were taken before it went are lost with the rest.
TEST(mailman, a_side_that_is_down) {
    for (const bool use_poll : {false, true}) {
        for (const bool mailman_is_down : {true, false}) {
            mailman_scene here(use_poll);
            upstream& down = mailman_is_down ? here.mailman : here.up;
            const std::string dead = mailman_is_down ? "list@example.com" : "b@example";
            const std::string alive = mailman_is_down ? "b@example" : "list@example.com";
            down.refuse();
            CHECK_EQ(here.mail({alive, dead, dead, alive}), OK + " / " + OK + " / " + NOT_AVAILABLE + " / " +
                                                                NOT_AVAILABLE + " / " + OK + " / 354 / " + TAKEN);
            CHECK_EQ(here.mail({dead}), OK + " / " + NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("RCPT TO:<" + alive + ">"), OK);   // the same transaction
            down.accept_again();
            CHECK_EQ(here.client.ask("RCPT TO:<" + dead + ">"), OK);
            down.script["RCPT"] = {hangs_up()};   // with a recipient on board
            CHECK_EQ(here.client.ask("RCPT TO:<" + dead + ">"), NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("RCPT TO:<" + alive + ">"), NOT_AVAILABLE);
            CHECK_EQ(here.client.ask("DATA"), NOT_AVAILABLE);
            CHECK_EQ(here.mail({dead, alive}), END_OF_TWO + TAKEN);
            // It leaves before DATA.
            here.client.ask("MAIL FROM:<a@client.test>");
            here.client.ask("RCPT TO:<" + dead + ">");
            here.client.ask("RCPT TO:<" + alive + ">");
            down.hang_up();
            here.settle();
            CHECK_EQ(here.client.ask("DATA"), NOT_AVAILABLE);
            // The same, when it has refused its recipient: nothing is lost.
            down.script["RCPT"] = {says(NO)};
            here.client.ask("MAIL FROM:<a@client.test>");
            CHECK_EQ(here.client.ask("RCPT TO:<" + dead + ">"), NO);
            CHECK_EQ(here.client.ask("RCPT TO:<" + alive + ">"), OK);
            down.hang_up();
            here.settle();
            CHECK_EQ(here.client.ask("DATA").substr(0, 3), std::string("354"));
            CHECK_EQ(here.client.ask(body + "\r\n."), TAKEN);
            here.finish();
        }
    }
}

// As in CPython 3.10, which enqueues for each recipient: a list that is named twice gets the message twice.
TEST(mailman, a_list_that_is_named_twice) {
    mailman_scene here;
    CHECK_EQ(here.mail({"list@example.com", "list@example.com"}), END_OF_TWO + TAKEN);
    CHECK_EQ(recipients(here.mailman), std::string("(list@example.com)(list@example.com)"));
    here.finish();
}

// Deviation 49
TEST(mailman, a_list_that_can_not_be_looked_up_is_451) {
    for (const std::string how : {"missing", "a file", "a loop", "the list's own folder"}) {
        mailman_scene here;
        const auto lists = here.lists.path() / "lists";
        support::captured out(std::cout);
        here.server.check_settings();
        const auto aside = here.lists.path() / "aside";
        if (how != "the list's own folder") std::filesystem::rename(lists, aside);
        if (how == "a file") std::ofstream(lists) << "not a folder";
        if (how == "a loop") std::filesystem::create_symlink(lists, lists);
        if (how == "the list's own folder")
            std::filesystem::create_symlink("sick.example.com", lists / "sick.example.com");
        if (how != "the list's own folder") {
            CHECK_THROWS(here.server.check_settings(), std::system_error);
            CHECK_EQ(here.mail({"list@example.com", "b@example"}), OK + " / " + NOT_AVAILABLE + " / " + NOT_AVAILABLE);
            std::filesystem::remove(lists);
            std::filesystem::rename(aside, lists);
            CHECK_EQ(here.client.ask("RCPT TO:<list@example.com>"), OK);
        } else {
            CHECK_EQ(here.mail({"sick@example.com", "b@example"}),
                     OK + " / " + NOT_AVAILABLE + " / " + OK + " / 354 / " + TAKEN);
        }
        CHECK_EQ(here.client.ask("RSET"), OK);
        CHECK_EQ(here.mail({"list@example.com", "b@example"}), END_OF_TWO + TAKEN);
        CHECK_EQ(here.mail({"file@example.com", "nolist@example.com"}), END_OF_TWO + TAKEN);
        CHECK_EQ(recipients(here.mailman), std::string("(list@example.com)"));
        // While the message comes: it goes to neither.
        here.up.messages.clear();
        here.client.ask("MAIL FROM:<a@client.test>");
        CHECK_EQ(here.client.ask("RCPT TO:<list@example.com>"), OK);
        CHECK_EQ(here.client.ask("DATA").substr(0, 3), std::string("354"));
        std::filesystem::rename(lists, aside);
        CHECK_EQ(here.client.ask(body + "\r\n.").substr(0, 3), std::string("451"));
        std::filesystem::rename(aside, lists);
        CHECK_EQ(here.up.messages.size(), 0u);
        here.finish();
    }
}

// Deviation 50
TEST(mailman, more_than_50_hops_are_too_many) {
    mailman_scene here;
    std::string hops;
    for (int i = 0; i < 51; ++i) hops += "X-Peer: 192.0.2.1\r\n";
    CHECK_EQ(here.mail({"list@example.com", "b@example"}, hops + body), END_OF_TWO + "554 Error: too many hops");
    CHECK_EQ(here.mail({"list@example.com", "b@example"}), END_OF_TWO + TAKEN);
    here.finish();
}

TEST(mailman, stop_ends_what_goes_to_a_list) {
    mailman_scene here;
    here.mailman.always["end"] = says_nothing();
    here.client.ask("MAIL FROM:<a@client.test>");
    here.client.ask("RCPT TO:<b@example>");
    here.client.ask("RCPT TO:<list@example.com>");
    here.client.ask("RCPT TO:<my-list@example.com>");
    here.client.ask("DATA");
    here.client.say(body + "\r\n.\r\n");
    here.run_until([&] { return here.mailman.messages.size() == 1; });
    const auto start = asyncore::clock::now();
    here.server.stop(milliseconds(50));
    here.client.wait_for_close();
    here.run_until([&] { return here.map.size() == 2; });
    CHECK(asyncore::clock::now() - start < std::chrono::seconds(4));
    CHECK(here.client.received.substr(0, 3) != "250");
}

TEST(mailman, everything_goes_with_a_message_in_hand) {
    for (const bool at_mailman : {false, true}) {
        for (const std::string stage : {"greeting", "MAIL", "RCPT", "DATA", "end"}) {
            for (const int how : {0, 1, 2}) {
                smtpd::options with;
                with.upstream.quit = milliseconds(10);
                mailman_scene here(false, with);
                upstream& side = at_mailman ? here.mailman : here.up;
                side.script[stage] = {says("250 fine").when_released()};
                here.client.say(
                    "MAIL FROM:<a@client.test>\r\nRCPT TO:<b@example>\r\nRCPT TO:<list@example.com>\r\n"
                    "RCPT TO:<my-list@example.com>\r\nDATA\r\n" +
                    body + "\r\n.\r\n");
                here.run_until([&] { return side.held() == 1; });
                if (how == 0) here.client.reset();
                if (how == 1) here.owned.reset();
                if (how == 2) asyncore::close_all(&here.map);
                here.settle();
                if (side.held() > 0) side.release();
                here.run_until([&] { return here.up.open() + here.mailman.open() == 0; });
                CHECK(here.up.messages.size() <= 1 && here.mailman.messages.size() <= 2);
            }
        }
    }
}

namespace {

// Mailman by other means.
struct own_mailman : smtpd::MailmanProxy {
    using MailmanProxy::MailmanProxy;
    std::vector<std::string> asked_for;
    std::string queued, for_whom;
    smtpd::reply says{250, "queued"};
    bool later = false;
    smtpd::SMTP::handler waiting;

    bool list_exists(const std::string& listname, const std::string& domain) const override {
        return listname == "own" && domain == "example.com";
    }
    void enqueue(const std::string& mailfrom, const std::vector<std::string>& recipients, std::string message,
                 const smtpd::message_options&, smtpd::SMTP::handler then) override {
        for_whom = mailfrom + ":";
        for (const auto& it : recipients) for_whom += " " + it;
        queued = std::move(message);
        if (later)
            waiting = std::move(then);
        else
            then(says);
    }
};

}   // namespace

TEST(mailman, list_exists_and_enqueue_of_ones_own) {
    smtpd::options with;
    with.mailman_lmtp = {};
    scene_with<own_mailman> here(false, with);
    const std::vector<std::string> to{"own@example.com", "b@example", "own-request@example.com"};
    const std::string so_far = OK + " / " + OK + " / " + OK + " / " + OK + " / 354 / ";
    CHECK_EQ(here.client.mail("<a@client.test>", to, body), so_far + "250 queued");
    CHECK_EQ(here.server.for_whom, std::string("a@client.test: own@example.com own-request@example.com"));
    CHECK_EQ(recipients(here.up), std::string("(b@example)"));
    here.server.says = {452, "no room"};
    CHECK_EQ(here.client.mail("<a@client.test>", to, body), so_far + "452 no room");
    here.server.says = {};
    CHECK_EQ(here.client.mail("<a@client.test>", to, body), so_far + NOT_AVAILABLE);
    here.up.script["end"] = {says(NO)};
    here.server.for_whom.clear();
    CHECK_EQ(here.client.mail("<a@client.test>", to, body), so_far + NO);
    CHECK_EQ(here.server.for_whom, std::string());
    // Later, and for a client that has gone.
    here.server.later = true;
    here.client.ask("MAIL FROM:<a@client.test>");
    here.client.ask("RCPT TO:<own@example.com>");
    here.client.ask("DATA");
    here.client.say(body + "\r\n.\r\n");
    here.run_until([&] { return here.server.waiting != nullptr; });
    here.settle();
    CHECK_EQ(here.client.received, std::string());
    here.server.waiting({250, "at last"});
    here.server.waiting = nullptr;
    CHECK_EQ(here.client.answer(), std::string("250 at last"));
    here.client.ask("MAIL FROM:<a@client.test>");
    here.client.ask("RCPT TO:<own@example.com>");
    here.client.ask("DATA");
    here.client.say(body + "\r\n.\r\n");
    here.run_until([&] { return here.server.waiting != nullptr; });
    here.client.reset();
    here.settle();
    std::exchange(here.server.waiting, nullptr)({250, "too late"});
    here.wait_until_upstream_is_left();
}

TEST(mailman, enqueue_for_nobody) {
    struct nobody : own_mailman {
        using own_mailman::own_mailman;
        void enqueue(const std::string& mailfrom, const std::vector<std::string>&, std::string message,
                     const smtpd::message_options& kwargs, smtpd::SMTP::handler then) override {
            MailmanProxy::enqueue(mailfrom, {}, std::move(message), kwargs, std::move(then));
        }
    };
    smtpd::options with;
    with.mailman_lmtp = {};
    scene_with<nobody> here(false, with);
    CHECK_EQ(here.client.mail("<a@client.test>", {"own@example.com"}, body),
             OK + " / " + OK + " / 354 / 554 Error: no recipients");
}
