# Completion for smtpd in bash.
_smtpd() {
    COMPREPLY=()
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    [[ $word != = ]] || word=
    [[ $before != = ]] || before=${COMP_WORDS[COMP_CWORD - 2]}   # --class=NAME comes in three words
    case $before in
    -c | --class)
        COMPREPLY=($(compgen -W "DebuggingServer PureProxy MailmanProxy SMTPServer" -- "$word"))
        return
        ;;
    --mailman-lists)
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -d -- "$word"))
        return
        ;;
    -s | --size | --mailman-lmtp) return ;;
    esac
    [[ $word != -* ]] || COMPREPLY=($(compgen -W "-n --nosetuid -c --class -s --size -u --smtputf8 --mailman-lists
        --mailman-lmtp -d --debug -V --version -h --help" -- "$word"))
}
complete -F _smtpd smtpd
