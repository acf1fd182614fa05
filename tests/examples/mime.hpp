// MIME, as much of it as it takes to show mail to a person: headers (RFC 2047), the names of files (RFC 2231), parts
// in parts, quoted-printable and base64; UTF-8 and Latin-1. The work grows with the message, whatever is in it. What
// this gives as text is valid UTF-8; control characters are left to the one who shows it.
//
//     mime::part mail(data);                                   // looks into `data`, which has to stay
//     std::cout << mail.header("subject") << '\n';
//     for (const auto& leaf : mail.leaves())                   // what is no multipart
//         if (!leaf.attachment) std::cout << leaf.text();
#ifndef MIME_HPP
#define MIME_HPP

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mime {

inline std::string lower(std::string text) {
    for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
    return text;
}
inline std::string_view strip(std::string_view text) {
    const auto first = std::min(text.find_first_not_of(" \t\r\n"), text.size());
    return text.substr(first, text.find_last_not_of(" \t\r\n") + 1 - first);
}

// Bytes of the character that the text begins with; 0 when that is not UTF-8.
inline std::size_t utf8_length(std::string_view text) {
    const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
    const unsigned a = byte(0), b = byte(1);
    const std::size_t length = a < 0x80 ? 1 : a < 0xc2 ? 0 : a < 0xe0 ? 2 : a < 0xf0 ? 3 : a < 0xf5 ? 4 : 0;
    for (std::size_t i = 1; i < length; ++i)
        if (byte(i) >> 6 != 2) return 0;
    const bool wrong =
        (a == 0xe0 && b < 0xa0) || (a == 0xed && b > 0x9f) || (a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f);
    return wrong ? 0 : length;
}

// Any text as UTF-8. What calls itself UTF-8 and is not gets U+FFFD; bytes of any other charset are taken for Latin-1
// as browsers have it, with Windows' characters, unless they are UTF-8 all the same.
inline std::string to_utf8(std::string_view text, const std::string& charset = "utf-8") {
    static const char16_t windows[] =
        u"\u20ac\ufffd\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152"
        u"\ufffd\u017d\ufffd\ufffd\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\ufffd\u017e"
        u"\u0178";
    bool latin = charset == "iso-8859-1" || charset == "latin1" || charset == "windows-1252";
    auto rest = charset == "utf-8" || latin ? "" : text;
    for (std::size_t n; !rest.empty() && !latin; rest.remove_prefix(n)) latin = (n = utf8_length(rest)) == 0;
    std::string to;
    for (std::size_t length; !text.empty(); text.remove_prefix(std::max<std::size_t>(length, 1))) {
        const auto byte = static_cast<unsigned char>(text[0]);
        length = latin ? byte < 0x80 : utf8_length(text);
        to += text.substr(0, length);
        if (length > 0) continue;
        const unsigned c = !latin ? 0xfffd : byte > 0x9f ? byte : windows[byte - 0x80];
        if (c > 0x7ff) to += static_cast<char>(0xe0 | c >> 12);
        to += static_cast<char>(c > 0x7ff ? 0x80 | (c >> 6 & 63) : 0xc0 | c >> 6);
        to += static_cast<char>(0x80 | (c & 63));
    }
    return to;
}

inline std::string base64(std::string_view text) {
    static const std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string to;
    unsigned bits = 0, count = 0;
    for (const char c : text) {
        const auto digit = digits.find(c);
        if (c == '=') count = 0;
        if (digit == digits.npos) continue;
        bits = bits << 6 | static_cast<unsigned>(digit);
        if ((count += 6) >= 8) to += static_cast<char>(bits >> (count -= 8) & 255);
    }
    return to;
}

// With `escape` '=': quoted-printable; '%' as in RFC 2231. What is no escape stays as it is.
inline std::string unquote(std::string_view text, char escape = '=') {
    static const std::string digits = "0123456789ABCDEF0123456789abcdef";
    std::string to;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto high = i + 2 < text.size() ? digits.find(text[i + 1]) : digits.npos;
        const auto low = high != digits.npos ? digits.find(text[i + 2]) : digits.npos;
        const auto end = text[i] == escape ? std::min(text.find_first_not_of(" \t\r", i + 1), text.size()) : i;
        if (text[i] != escape) {
            to += text[i];
        } else if (low != digits.npos) {
            to += static_cast<char>(high % 16 * 16 + low % 16), i += 2;
        } else if (escape == '=' && (end == text.size() || text[end] == '\n')) {
            i = end;   // a soft line end
        } else {
            to += escape;
        }
    }
    return to;
}

// =?charset?q?text?= and =?charset?b?text?= in a header. Such words that follow one another are one text.
inline std::string decode_words(std::string_view text) {
    std::string to, bytes, charset;   // `bytes` wait for the words that may follow
    const auto flush = [&] { to += to_utf8(std::exchange(bytes, {}), charset); };
    while (!text.empty()) {
        const auto start = std::min(text.find("=?"), text.size());
        const auto word = text.substr(std::min(start + 2, text.size()), 1000);   // RFC 2047 has 75 at most
        const auto q1 = word.find('?'), q2 = q1 + 2, end = q1 < word.size() ? word.find("?=", q2 + 1) : word.npos;
        const char kind = end == word.npos || word[q2] != '?' ? '-' : word[q1 + 1];
        const bool is_word = std::string_view("qQbB").find(kind) != std::string_view::npos;
        const auto before = text.substr(0, is_word ? start : start + 2);
        if (bytes.empty() || !is_word || !strip(before).empty()) flush(), to += to_utf8(before, "");
        text.remove_prefix(before.size());
        if (!is_word) continue;
        const auto name = lower(std::string(word.substr(0, std::min(q1, word.find('*')))));
        std::string encoded(word.substr(q2 + 1, end - q2 - 1));
        std::replace(encoded.begin(), encoded.end(), '_', ' ');   // which base64 does not have
        if (name != charset) flush();
        charset = name;
        bytes += kind == 'b' || kind == 'B' ? base64(encoded) : unquote(encoded);
        text.remove_prefix(2 + end + 2);
    }
    flush();
    return to;
}

// `text/html; charset=utf-8`: what stands first has the name "". Values in pieces (name*0, name*1) are put together.
inline std::map<std::string, std::string> parameters(std::string_view value) {
    std::map<std::string, std::string> found, result;
    std::string name, word;
    bool quoted = false, valued = true;
    value = value.substr(0, 10000);
    for (std::size_t i = 0; i <= value.size(); ++i) {
        const char c = i < value.size() ? value[i] : ';';
        if (c == '"') {
            quoted = !quoted;
        } else if (c == ';' && (!quoted || i == value.size())) {
            found.emplace(lower(std::string(strip(std::exchange(name, {})))), strip(word));
            word.clear(), valued = false;
        } else if (c == '=' && !quoted && !valued) {
            valued = true;
        } else {
            (valued ? word : name) += c == '\\' && quoted && i + 1 < value.size() ? value[++i] : c;
        }
    }
    for (const auto& [key, text] : found) {
        const auto star = std::min(key.find('*'), key.size());
        auto& whole = result[key.substr(0, star)];
        if (key.size() < star + 2 || key[star + 1] == '0') whole.clear();   // this is its begin, or better than `name=`
        const bool coded = star < key.size() && key.back() == '*';
        const auto charset_end = coded && whole.empty() ? text.find('\'', text.find('\'') + 1) + 1 : 0;
        whole += coded ? unquote(text.substr(charset_end), '%') : text;
    }
    return result;
}

struct part {
    std::vector<std::pair<std::string, std::string>> headers;   // the values unfolded, otherwise as they came
    std::string_view body;                                      // as it came: content() and text() decode it
    std::string type, charset, boundary, filename, encoding, id;
    bool attachment = false;

    explicit part(std::string_view all) : body(all) {
        while (!body.empty()) {
            const auto end = std::min(body.find('\n'), body.size());
            const auto line = body.substr(0, end);
            const auto colon = line.find(':');
            const bool more = !headers.empty() && !line.empty() && (line[0] == ' ' || line[0] == '\t');
            if (!more && !strip(line).empty() && colon == line.npos) break;   // no header: the body begins
            body.remove_prefix(std::min(end + 1, body.size()));
            if (strip(line).empty()) break;
            if (headers.size() == 200) continue;
            if (!more) headers.emplace_back(strip(line.substr(0, colon)), strip(line.substr(colon + 1)));
            if (more) (headers.back().second += ' ') += strip(line);
        }
        auto kind = parameters(raw("content-type")), disposition = parameters(raw("content-disposition"));
        type = kind[""].find('/') == std::string::npos ? "text/plain" : lower(kind[""]);
        charset = lower(kind["charset"]), boundary = kind["boundary"];
        filename = decode_words(disposition["filename"].empty() ? kind["name"] : disposition["filename"]);
        encoding = lower(raw("content-transfer-encoding"));
        id = raw("content-id");
        if (id.size() > 2 && id[0] == '<') id = id.substr(1, id.size() - 2);
        attachment = lower(disposition[""]) == "attachment" || (type != "text/plain" && type != "text/html");
    }
    std::string raw(const std::string& name) const {   // of the first one; "" when there is none. `name` in lower case
        for (const auto& header : headers)
            if (lower(header.first) == name) return header.second;
        return "";
    }
    std::string header(const std::string& name) const { return decode_words(raw(name)); }
    std::string content() const {
        return encoding == "base64" ? base64(body) : encoding == "quoted-printable" ? unquote(body) : std::string(body);
    }
    std::string text() const { return to_utf8(content(), charset); }

    // What there is when multiparts are opened: at most 200, from at most 20 multiparts one in another.
    std::vector<part> leaves() const {
        std::vector<part> result;
        return add_leaves(result, 0), result;
    }

  private:
    void add_leaves(std::vector<part>& result, int depth) const {
        if (result.size() >= 200) return;
        if (type.substr(0, 10) != "multipart/" || boundary.empty() || boundary.size() > 200 || depth == 20)
            return result.push_back(*this);
        const std::string mark = "--" + boundary;
        std::size_t start = body.npos;   // of the piece that has begun
        for (std::size_t at = 0; at < body.size() && result.size() < 200;) {
            const auto end = std::min(body.find('\n', at), body.size());
            const auto line = body.substr(at, end - at);
            const auto rest = line.substr(0, mark.size()) == mark ? strip(line.substr(mark.size())) : "no mark";
            if (rest.empty() || rest == "--") {
                if (start != body.npos)
                    part(body.substr(start, std::max(at, start + 1) - start - 1)).add_leaves(result, depth + 1);
                start = rest.empty() ? end + 1 : body.npos;
                if (!rest.empty()) return;
            }
            at = end + 1;
        }
        if (start < body.size()) part(body.substr(start)).add_leaves(result, depth + 1);
    }
};

}   // namespace mime

#endif
