# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
# Debian's packages without installing them: extracted to a folder, from the mirror that this
# machine's apt uses. Sourced after scripts/setup.sh:
#
#     open_cache NAME                         sets $cache, and $version to NAME; holds its lock
#     extract_packages SUITE BACKPORTS NAMES  sets $work, a new folder in $cache with the root in
#                                             it; it goes when the script ends, unless it was moved
#
# VMTH_QEMU_CACHE (default ~/.cache/vmth) is where things are kept, VMTH_QEMU_MIRROR another mirror.

open_cache() {
    version=$1
    cache=${VMTH_QEMU_CACHE:-$HOME/.cache/vmth}
    mkdir -p "$cache"
    cache=$(CDPATH='' cd -- "$cache" && pwd)
    # Two may ask at once: one makes it, the other waits.
    exec 9>"$cache/$version.lock"
    ! command -v flock >/dev/null || flock 9
}

# The Debian mirror of this machine's apt: the first source of one of Debian's own suites.
mirror() {
    # shellcheck disable=SC2016 # the names are apt's
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null \
        | sed -nE 's/^(bullseye|bookworm|trixie|forky|sid|(old)*stable|testing|unstable) (.*)/\3/p' \
        | head -n 1
}

extract_packages() {
    suite=$1 backports=$2 names=$3
    [ "$(uname -m)" = x86_64 ] || die "$version can be fetched for x86_64 only, this is $(uname -m)"
    command -v apt-get >/dev/null || die "no apt-get here, and $version comes from Debian's packages"
    lacking=''
    command -v mmdebstrap >/dev/null || lacking=mmdebstrap
    [ -f /usr/share/keyrings/debian-archive-keyring.gpg ] \
        || lacking="$lacking debian-archive-keyring" # Debian's derivatives come without
    # shellcheck disable=SC2086 # names without spaces
    [ -z "$lacking" ] || install_packages $lacking
    from=${VMTH_QEMU_MIRROR:-$(mirror)}
    from=${from:-http://deb.debian.org/debian}

    work=$(mktemp -d "$cache/$version.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # As this machine's apt reaches its mirrors: proxies, certificates, retries.
    apt-config dump | grep -E '^Acquire::(http|https|Retries|ForceIPv[46])\b' >"$work/apt.conf" || :
    {
        printf 'deb %s %s main\n' "$from" "$suite"
        [ -z "$backports" ] || printf 'deb %s %s main\n' "$from" "$backports"
    } >"$work/sources.list"
    # Backports are taken only where a pin prefers them.
    printf 'Package: *\nPin: release n=%s\nPin-Priority: 900\n' "${backports:-$suite}" \
        >"$work/preferences"
    # shellcheck disable=SC2016 # $1 is for the hook's own shell
    run mmdebstrap --variant=extract --architectures=amd64 --include="$names" \
        --aptopt="$work/apt.conf" \
        --setup-hook='mkdir -p "$1/etc/apt/preferences.d"' \
        --setup-hook="copy-in '$work/preferences' /etc/apt/preferences.d" \
        "$suite" "$work/root" "$work/sources.list" >&2 </dev/null \
        || die "could not fetch $version from $from; is it a mirror with $suite $backports? VMTH_QEMU_MIRROR names another mirror"
    chmod 755 "$work"
}
