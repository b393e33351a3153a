// SPDX-License-Identifier: Apache-2.0
// Taking the missed pages out of a packet's.
#include "xfer/missed_pages.hpp"

namespace vmth {

bool remove_runs(std::vector<vmth_run> &runs, std::vector<vmth_run> missed)
{
    const auto by_page = [](const vmth_run &a, const vmth_run &b) { return a.page < b.page; };
    std::sort(runs.begin(), runs.end(), by_page);
    std::sort(missed.begin(), missed.end(), by_page);
    std::vector<vmth_run> whole;  // a missed run may lie in several that follow one another
    for (const vmth_run &run : runs) {
        if (!whole.empty() && whole.back().page + whole.back().npages == run.page) {
            whole.back().npages += run.npages;
        } else {
            whole.push_back(run);
        }
    }
    std::vector<vmth_run> left;
    size_t next = 0;  // of missed
    for (const vmth_run &run : whole) {
        uint64_t page = run.page;
        const uint64_t end = run.page + run.npages;
        for (; next < missed.size() && missed[next].page < end; next++) {
            const vmth_run &gone = missed[next];
            if (gone.page < page || gone.npages > end - gone.page) {
                return false;
            }
            if (gone.page > page) {
                left.push_back({page, gone.page - page});
            }
            page = gone.page + gone.npages;
        }
        if (page < end) {
            left.push_back({page, end - page});
        }
    }
    runs = std::move(left);
    return next == missed.size();
}

}  // namespace vmth
