package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"
)

func (a *app) configCommand() *cobra.Command {
	return group("config", "Show, check and document the configuration",
		a.configPrintCommand(), a.configValidateCommand(), a.configDocsCommand())
}

// addAllSettingFlags gives a command every setting, so that it can be run with the flags of any other command.
func addAllSettingFlags(cmd *cobra.Command) { addSettingFlags(cmd.Flags(), ^use(0)) }

// A settingValue is one line of `config print -o json`.
type settingValue struct {
	Setting string `json:"setting"`
	Value   string `json:"value"`
	Origin  string `json:"origin"`
}

func (a *app) configPrintCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "print", Short: "Show every setting, its value and where it came from", Args: noArgs,
		Long: `Show every setting, its value and where it came from: a flag, an environment variable, a file, or the default. Secrets are
masked. It takes the flags of all commands, so that the effect of a command line can be tried out.`,
		RunE: a.action(func(_ *cobra.Command, cfg *configuration) error {
			t := newTable("SETTING", "VALUE", "ORIGIN").cut(1, 2)
			for i := range settings {
				s := &settings[i]
				value := settingValue{s.name, cfg.show(s), cfg.origin(s.name)}
				if value.Value == "" && s.effective != nil {
					var err error
					if value.Value, err = s.effective(&cfg.Config); err != nil {
						a.say("%s: %v", cfg.describe(s.name), err)
					}
				}
				if a.output == outputJSON {
					if err := a.writeJSON(value); err != nil {
						return err
					}
					continue
				}
				t.add(value.Setting, value.Value, value.Origin)
			}
			if a.output != outputJSON {
				if err := t.write(a.stdout); err != nil {
					return err
				}
			}
			a.warn(cfg)
			return nil
		}),
	}
	addAllSettingFlags(cmd)
	a.addOutputFlag(cmd)
	return cmd
}

// warn shows what deserves a word but is no error.
func (a *app) warn(cfg *configuration) {
	for _, warning := range slices.Concat(cfg.warnings, cfg.notes) {
		a.say("warning: %s", warning)
	}
}

func (a *app) configValidateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "validate", Short: "Check the configuration of serve without starting it", Args: noArgs,
		Long: fmt.Sprintf(`Check the configuration of serve without starting it and without a database: values, files, secrets, certificates and
connection strings. The exit code is 0 when it is good and %d when it is not; every problem is shown.`, exitUsage),
		RunE: a.action(func(_ *cobra.Command, cfg *configuration) error {
			err := cfg.validate()
			a.warn(cfg)
			if err != nil {
				return err
			}
			return a.writeLine([]byte("the configuration is valid"))
		}),
	}
	addAllSettingFlags(cmd)
	return cmd
}
