#include "recorded_calls.h"

#include <map>
#include <mutex>

#include "empty.h"

namespace fastgan {
namespace {

thread_local RecordedCalls* recording = nullptr;
thread_local CallPlans* plans = nullptr;

// All recordings, by their numbers from 1 on.
struct Recordings {
  std::mutex mutex;
  std::map<int64_t, RecordedCalls> of_number;
  int64_t last = 0;
};

// Never destroyed: recordings may be dropped as late as Python ends.
Recordings& recordings() {
  static auto* const all = new Recordings;
  return *all;
}

// Null for a number that is none; 0 is.
RecordedCalls* find_recording(int64_t number) {
  Recordings& all = recordings();
  const std::lock_guard lock(all.mutex);
  const auto found = all.of_number.find(number);
  return found == all.of_number.end() ? nullptr : &found->second;
}

// Calls whose arguments were swapped with tensors of this call, until they are swapped back.
class Lent {
 public:
  Lent(RecordedCalls& calls, const std::vector<Tensor>& values, const std::vector<int64_t>& places)
      : calls_(calls), places_(places) {
    // One for each place: a value may have several.
    for (size_t i = 0; i < places_.size(); i += 3) tensors_.push_back(values[places_[i + 2]]);
    while (done_ < tensors_.size() && swap(done_)) ++done_;
    if (done_ == tensors_.size()) return;
    const size_t wrong = 3 * done_;
    give_back();
    STD_TORCH_CHECK(false, "_run_recorded: argument ", places_[wrong + 1], " of call ", places_[wrong],
                    " is no tensor");
  }
  ~Lent() { give_back(); }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

 private:
  bool swap(size_t i) { return calls_[places_[3 * i]]->swap(static_cast<size_t>(places_[3 * i + 1]), tensors_[i]); }

  void give_back() {
    while (done_) swap(--done_);
  }

  RecordedCalls& calls_;
  const std::vector<int64_t>& places_;
  std::vector<Tensor> tensors_;
  size_t done_ = 0;
};

// Runs calls [first, first + count) of a recording, with some arguments exchanged: of each three `places`, the second
// is that of the argument in call number one, the third that of the tensor in `values`, or behind those that of a new
// image in float32. Of the new ones `sizes` holds four numbers each; they are returned. One thread at a time.
std::vector<Tensor> run_recorded(const Tensor& memory, int64_t number, int64_t first, int64_t count,
                                 std::vector<Tensor> values, std::vector<int64_t> places, std::vector<int64_t> sizes) {
  RecordedCalls* const calls = find_recording(number);
  STD_TORCH_CHECK(calls, "_run_recorded: there is no recording ", number);
  const auto all = static_cast<int64_t>(calls->size());
  STD_TORCH_CHECK(first >= 0 && count >= 0 && first + count <= all, "_run_recorded: the recording has ", all,
                  " calls, got ", first, " and ", count);
  STD_TORCH_CHECK(places.size() % 3 == 0, "_run_recorded: places must come by three, got ", places.size());
  STD_TORCH_CHECK(sizes.size() % 4 == 0, "_run_recorded: sizes must come by four, got ", sizes.size());
  const size_t brought = values.size();
  for (size_t i = 0; i < sizes.size(); i += 4) values.push_back(empty_dense({&sizes[i], 4}, ScalarType::Float, false));
  for (size_t i = 0; i < places.size(); i += 3) {
    STD_TORCH_CHECK(
        places[i] >= 0 && places[i] < all && places[i + 2] >= 0 && places[i + 2] < static_cast<int64_t>(values.size()),
        "_run_recorded: there is no call ", places[i], " or no value ", places[i + 2]);
  }
  {
    const Lent lent(*calls, values, places);
    for (int64_t i = first; i < first + count; ++i) (*calls)[i]->run();
  }
  values.erase(values.begin(), values.begin() + static_cast<int64_t>(brought));
  return values;
}

}  // namespace

RecordedCalls* recording_of_thread() { return recording; }
CallPlans*& plans_of_thread() { return plans; }

}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("_run_recorded", TORCH_BOX(&fastgan::run_recorded)); }

// The number of a new recording, without calls.
extern "C" __attribute__((visibility("default"))) int64_t fastgan_new_recording() {
  fastgan::Recordings& all = fastgan::recordings();
  const std::lock_guard lock(all.mutex);
  all.of_number[++all.last];
  return all.last;
}

extern "C" __attribute__((visibility("default"))) void fastgan_drop_recording(int64_t number) {
  fastgan::Recordings& all = fastgan::recordings();
  const std::lock_guard lock(all.mutex);
  all.of_number.erase(number);
}

// From now on this thread's calls are added to a recording, and not run; to none, and run, after number 0.
extern "C" __attribute__((visibility("default"))) void fastgan_record(int64_t number) {
  fastgan::recording = fastgan::find_recording(number);
}
