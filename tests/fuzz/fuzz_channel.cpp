// A client says anything to SMTPChannel, in pieces of any size. What it hears must be one reply to each command, what
// is delivered must be what it sent, the state and the memory of the channel must keep within their bounds; and all of
// it must be the same when the client says it in one piece.

#include "fuzz.hpp"

namespace {

namespace channel_target {

using namespace fuzz;

// What an input decides before it says anything.
struct plan {
    bool use_poll, ends, breaks;
    smtpd::options with;
    std::size_t room;        // for replies, after each piece; 0: any
    std::size_t pieces[2];   // in turn; 0: all of the rest
    unsigned answers;        // what process_message() does: four bits for each of four messages, over and over
};

plan read_plan(choices& input) {
    static constexpr std::size_t sizes[] = {smtpd::DATA_SIZE_DEFAULT, 0, 1, 60, 1000, 70000};
    static constexpr std::size_t recipients[] = {1000, 0, 1, 2};
    static constexpr std::size_t queues[] = {1 << 20, 0, 1, 300};
    plan it{};
    const unsigned flags = input.byte();
    it.with.decode_data = flags & 1;
    it.with.enable_SMTPUTF8 = !it.with.decode_data && flags & 2;
    it.use_poll = flags & 4;
    it.ends = flags & 8;
    it.breaks = flags & 16;
    it.with.data_size_limit = input.one_of(sizes);
    const unsigned limits = input.byte();
    it.with.rcpt_limit = recipients[limits % 4];
    it.with.reply_queue_limit = queues[limits / 4 % 4];
    it.room = input.byte();
    for (auto& size : it.pieces) size = input.byte();
    it.answers = input.byte();
    it.answers |= input.byte() << 8;
    return it;
}

struct delivery {
    std::string mailfrom;
    std::vector<std::string> rcpttos;
    std::string data;
    std::vector<std::string> mail_options, rcpt_options;

    bool operator==(const delivery& other) const {
        return mailfrom == other.mailfrom && rcpttos == other.rcpttos && data == other.data &&
               mail_options == other.mail_options && rcpt_options == other.rcpt_options;
    }
};

class server;

struct channel : smtpd::SMTPChannel {
    server& of;
    channel(server& made_by, std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from);
    ~channel() override;
    void check() const;
};

class server : public smtpd::SMTPServer {
  public:
    std::vector<delivery> deliveries;
    std::vector<std::string> answers;   // that the client is to hear
    std::vector<smtpd::deferred_reply> owed;
    channel* client = nullptr;
    bool closed_by_hook = false;

    server(asyncore::map_type& map, const plan& of)
        : SMTPServer({"127.0.0.1", 0}, {},
                     [&] {
                         auto with = of.with;
                         with.map = &map;
                         with.fqdn = "mx.test";
                         return with;
                     }()),
          plan_(of) {
        close();   // clients are handed over
    }

    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        auto made = std::make_unique<channel>(*this, std::move(sock), from);
        made->ignore_log_types.emplace_back("error");
        client = made.get();
        return made;
    }

    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        const unsigned action = plan_.answers >> deliveries.size() % 4 * 4 & 15;
        deliveries.push_back({mailfrom, rcpttos, data, kwargs.mail_options, kwargs.rcpt_options});
        const auto hears = [this](const std::string& answer) { answers.push_back(answer + "\r\n"); };
        const std::string text = "250-one\r\n250 two", no = "550 no such user";
        switch (action) {
            case 0:
                hears("250 OK");
                return std::nullopt;
            case 1:
                hears("250 OK");
                return "";
            case 2:
                hears(no);
                return no;
            case 3:
                hears(text);
                return text;
            case 4:
                hears("451 Error: message not processed");
                throw std::runtime_error("no");
            case 5:
                hears("451 Error: message not processed");
                throw 5;
            case 6:
            case 7:   // later
                hears("250 OK");
                owed.push_back(kwargs.defer());
                return no;
            case 8:   // later, twice
                hears("250 OK");
                owed.push_back(kwargs.defer());
                owed.push_back(kwargs.defer());
                return std::nullopt;
            case 9:   // at once
                hears(no);
                kwargs.defer().answer(no);
                return "250 not this";
            case 10:   // never
                hears("451 Error: message not processed");
                kwargs.defer();
                return std::nullopt;
            case 11:
                hears("451 Error: message not processed");
                owed.push_back(kwargs.defer());
                throw std::runtime_error("no");
            case 12:
                hears("250 OK");
                received = std::move(data);
                return std::nullopt;
            case 13: {   // a pass inside the hook
                hears("250 OK");
                const std::size_t before = deliveries.size();
                pass(*_map, plan_.use_poll);
                FUZZ_CHECK(deliveries.size() == before, "a message came while another one was processed");
                return std::nullopt;
            }
            case 14:
                hears(no);
                owed.push_back(kwargs.defer());
                owed.back().answer(no);
                return std::nullopt;
            default:
                closed_by_hook = true;
                client->close();
                return std::nullopt;
        }
    }

    std::string received;   // moved out of the channel

  private:
    const plan& plan_;
};

channel::channel(server& made_by, std::unique_ptr<asyncore::socket_type> sock, const asyncore::address& from)
    : SMTPChannel(made_by, std::move(sock), from, made_by.settings), of(made_by) {}

channel::~channel() { of.client = nullptr; }

// What is always true of a channel, whatever it has been told.
void channel::check() const {
    const auto tell = [this] { return "mailfrom " + show(mailfrom) + ", received_lines " + show(received_lines); };
    FUZZ_CHECK(smtp_state == COMMAND || smtp_state == DATA, tell());
    const auto* end = std::get_if<std::string>(&get_terminator());
    FUZZ_CHECK(end && *end == (smtp_state == DATA ? "\r\n.\r\n" : "\r\n"), tell());
    FUZZ_CHECK(smtp_state == COMMAND || !rcpttos.empty(), tell());
    FUZZ_CHECK(rcpttos.empty() || !mailfrom.empty(), tell());
    FUZZ_CHECK(mailfrom.empty() || !seen_greeting.empty(), tell());
    FUZZ_CHECK(!extended_smtp || !seen_greeting.empty(), tell());
    FUZZ_CHECK(!require_SMTPUTF8 || (enable_SMTPUTF8 && !mailfrom.empty()), tell());
    FUZZ_CHECK(!rcpt_limit || rcpttos.size() <= rcpt_limit, tell());
    const std::size_t most = smtp_state == DATA ? data_size_limit : max_command_size_limit();
    FUZZ_CHECK(!most || received_lines.size() <= most, tell());
    FUZZ_CHECK(received_lines.size() <= num_bytes, tell());
    FUZZ_CHECK(!data_size_limit || received_data.size() <= data_size_limit, tell());
    FUZZ_CHECK(max_command_size_limit() <= 548 && command_size_limits.size() <= 1, tell());
    FUZZ_CHECK(seen_greeting.size() <= 512 && mailfrom.size() <= 2 * 548, tell());
    FUZZ_CHECK(ac_in_buffer().size() <= ac_in_buffer_size + 8, std::to_string(ac_in_buffer().size()));
    FUZZ_CHECK(!ac_out_queue_limit || queued() <= ac_out_queue_limit + 1024, std::to_string(queued()));
}

struct outcome {
    std::string said;
    std::vector<delivery> deliveries;
    bool closed_by_hook;
};

// The client says `text`, in pieces as planned or in one.
outcome run(const plan& of, std::string_view text, bool in_pieces) {
    asyncore::map_type map;
    server mail(map, of);
    const auto client = connect_to(mail);
    const auto settle = [&] {
        for (std::size_t passes = 0; busy(map); ++passes) {
            FUZZ_CHECK(passes < 1000 + 4 * text.size(), "the loop does not come to rest");
            pass(map, of.use_poll);
            if (mail.client && mail.client->connected) mail.client->check();
        }
    };
    const auto answer_one = [&] {
        if (mail.owed.empty()) return;
        const auto reply = mail.owed.front();
        mail.owed.erase(mail.owed.begin());
        reply.answer();
    };
    const std::string_view all = text;
    for (std::size_t turn = 0; in_pieces && turn < 500 && !text.empty() && !client->closed; ++turn) {
        const std::size_t size = of.pieces[turn % 2];
        const auto piece = text.substr(0, size ? size : text.npos);
        client->input += piece;
        text.remove_prefix(piece.size());
        if (of.room) client->room = of.room;
        settle();
        if (turn % 3 == 2) answer_one();
    }
    client->input += text;
    client->room = SIZE_MAX;
    settle();
    if (of.breaks && in_pieces)
        client->broken = true;
    else
        client->input_ends = of.ends || of.breaks;
    for (settle(); !mail.owed.empty(); settle()) answer_one();
    FUZZ_CHECK(client->closed || !client->input_ends, "it stays open though the client has left");
    FUZZ_CHECK(client->closed || client->input.empty(), "it does not read on");
    FUZZ_CHECK(client->closed == map.empty(), "what is in the map?");

    // Who said what, and whether it is what should have been said.
    const bool broken_off = mail.closed_by_hook || (of.breaks && in_pieces);
    std::size_t delivered = 0, refused = 0;
    for (const auto& it : conversation(all, client->output, broken_off)) {
        if (!it.is_message) continue;
        const std::string data = unstuffed(it.said);
        std::string expected;
        if (of.with.data_size_limit && it.said.size() > of.with.data_size_limit) {
            expected = "552 Error: Too much mail data\r\n";
            ++refused;
        } else if (of.with.decode_data && !is_utf8(data)) {
            expected = "554 Error: message is not valid UTF-8\r\n";
            ++refused;
        } else {
            FUZZ_CHECK(delivered < mail.deliveries.size(), "not delivered: " + show(data));
            const delivery& as = mail.deliveries[delivered];
            FUZZ_CHECK(as.data == data, "is  " + show(as.data) + "\nnot " + show(data));
            expected = mail.answers[delivered++];
        }
        FUZZ_CHECK(it.answer == expected, "is  " + show(it.answer) + "\nnot " + show(expected));
    }
    FUZZ_CHECK(delivered == mail.deliveries.size() || broken_off, std::to_string(delivered));
    for (const auto& it : mail.deliveries) {
        FUZZ_CHECK(!it.mailfrom.empty() && !has_control(it.mailfrom) && is_utf8(it.mailfrom), show(it.mailfrom));
        FUZZ_CHECK(!it.rcpttos.empty(), show(it.mailfrom));
        FUZZ_CHECK(!of.with.rcpt_limit || it.rcpttos.size() <= of.with.rcpt_limit, show(it.rcpttos.back()));
        for (const auto& to : it.rcpttos) FUZZ_CHECK(!to.empty() && !has_control(to) && is_utf8(to), show(to));
        for (const auto& option : it.mail_options) FUZZ_CHECK(!has_control(option), show(option));
        FUZZ_CHECK(it.rcpt_options.empty(), show(it.rcpt_options[0]));
    }
    asyncore::close_all(&map);
    return {client->output, mail.deliveries, mail.closed_by_hook};
}

}   // namespace channel_target

}   // namespace

void fuzz_channel(const std::uint8_t* data, std::size_t size) {
    using namespace channel_target;
    choices input(data, size);
    const plan of = read_plan(input);
    const std::string text = fuzz::expanded(input.rest());
    const outcome pieces = run(of, text, true);
    const outcome whole = run(of, text, false);
    // What was on its way when the connection broke off need not have come.
    if (of.breaks) return;
    FUZZ_CHECK(pieces.deliveries == whole.deliveries, "in pieces it is delivered otherwise");
    if (pieces.closed_by_hook) return;
    FUZZ_CHECK(pieces.said == whole.said,
               "in pieces " + fuzz::show(pieces.said) + "\nat once   " + fuzz::show(whole.said));
}
